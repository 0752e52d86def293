"""Checks whether this machine, or each node of the cluster, has what a job needs. Each problem has a remedy.

Every check has a time limit. A check that does not end within its limit fails.
"""

from __future__ import annotations

import importlib.metadata
import os
import urllib.error
import urllib.request
from dataclasses import asdict
from http import HTTPStatus
from json import dumps, load

from pipeline.compute.cluster import require_answer
from pipeline.doctor import machine, nodes
from pipeline.doctor.check import Check, bounded, fail, ok
from pipeline.errors import EnvironmentFault

PATIENCE_S = 15.0  # time limit of a check


def run(cluster: bool, json: bool) -> int:
    """Run the checks and print the results as a table or as JSON. Return the exit code: 0, or 3 if a check failed."""
    found = checks(cluster)
    if json:
        print(dumps([asdict(check) for check in found], indent=1))
    else:
        _print(found)
    return EnvironmentFault.exit_code if any(check.status == "fail" for check in found) else 0


def checks(cluster: bool = False) -> list[Check]:
    """Return the results for this machine. With `cluster`, add the results for the nodes of the Ray cluster."""
    found = bounded({**machine.CHECKS, "Ray": _ray}, PATIENCE_S)
    return found + nodes.checks() if cluster else found


def _ray() -> Check:
    local = f"Ray {importlib.metadata.version('ray')}"
    address = (os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "").rstrip("/")
    other_cluster = "start a cluster (see infra/README.md), or correct RAY_API_SERVER_ADDRESS or RAY_ADDRESS"
    if address in ("", "local", "auto"):
        return ok(f"{local}; RAY_API_SERVER_ADDRESS and RAY_ADDRESS name no cluster: `sagan run` starts Ray here")
    try:
        if not address.startswith("http"):
            require_answer(address, timeout_s=5)
            return ok(f"{local}; the cluster at {address} answers")
        token = {"Authorization": f"Bearer {value}"} if (value := os.environ.get("RAY_AUTH_TOKEN")) else {}
        request = urllib.request.Request(f"{address}/api/version", headers=token)  # noqa: S310 - it begins with http
        with urllib.request.urlopen(request, timeout=5) as reply:  # noqa: S310
            remote = f"Ray {load(reply)['ray_version']}"
    except urllib.error.HTTPError as error:
        remedy = other_cluster
        if error.code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            remedy = "set RAY_AUTH_MODE=token, and set RAY_AUTH_TOKEN to the token of the cluster"
        return fail(f"{local}; {address} answers with HTTP status {error.code}", remedy)
    except (OSError, ValueError) as error:
        return fail(f"{local}; no cluster answers at {address}: {error}", other_cluster)
    if remote != local:
        return fail(
            f"{local} on this machine, but {remote} at {address}",
            f"install {remote} on this machine, or {local} on the cluster",
        )
    return ok(f"{local}; the cluster at {address} answers")


def _print(found: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table("", "", Column(overflow="fold"), box=None, pad_edge=False, show_header=False)
    for check in found:
        text = Text(check.found)
        if check.remedy:
            text.append(f"\n→ {check.remedy}", style="dim" if check.status == "warn" else "")
        table.add_row(Text(check.status, style=colours[check.status]), Text(check.name), text)
    Console().print(table)
