"""Run `ray start --block` on a machine that its cloud may take away, and send it SIGTERM at the cloud's notice.

Usage: `leave_at_notice.py CLOUD COMMAND...`; CLOUD is aws, azure or gcp. At SIGTERM, Ray reports to the head that the
node drains, so that its workers write a checkpoint and start again elsewhere. A SIGTERM or SIGINT of somebody else is
passed on as SIGTERM. The exit code is 0 after a notice or a signal, and otherwise that of the command. The file needs
Python alone. SAGAN_METADATA_URL replaces the address of the cloud's metadata server.

Sources: AWS, "Spot Instance interruption notices" and "Use IMDSv2"; Azure, "Scheduled Events for Linux VMs"; Google
Cloud, "Handle Spot VM preemption" and "Query VM metadata".
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Protocol
from urllib.parse import quote

METADATA = os.environ.get("SAGAN_METADATA_URL", "http://169.254.169.254")  # the same address in the three clouds
POLL_S = 1.0  # seconds between two questions
ANSWER_S = 5.0  # longest time until an answer
CHANGE_S = 60  # the server of Google Cloud answers when the value changes, or after so many seconds
LONGEST = 1_000_000  # bytes of an answer
_NO_ETAG = "0"  # differs from every tag of Google Cloud's server, which then answers at once


class Cloud(Protocol):
    """What a cloud says about this machine."""

    drain_s: int
    """Seconds that a drain may take: the time between notice and end, less the time until the notice is seen."""

    def notice(self) -> str | None:
        """Ask once. Return what will happen to the machine, or None.

        Raises OSError, HTTPException or ValueError where the metadata server gives no valid answer.
        """


class Aws:
    """Notices of spot instances, two minutes ahead, by IMDSv2. The server answers 404 while there is none."""

    drain_s = 100

    def __init__(self) -> None:
        self._token = ""

    def notice(self) -> str | None:
        if not self._token:
            self._token, _ = ask("/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}, method="PUT")
        try:
            text, _ = ask("/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": self._token})
        except (OSError, ValueError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 404:
                return None
            self._token = ""  # a token lives for six hours
            raise
        action = json.loads(text)
        return f"{action['action']} at {action['time']}"


class Azure:
    """Scheduled events, at least 30 seconds ahead for spot machines. The server also shows events of other machines."""

    drain_s = 25
    endings = "Preempt", "Terminate", "Redeploy", "Reboot"

    def __init__(self) -> None:
        self._name = ""

    def notice(self) -> str | None:
        header = {"Metadata": "true"}
        if not self._name:
            name, _ = ask("/metadata/instance/compute/name?api-version=2021-02-01&format=text", header)
            if not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(f"no name of a machine: {name[:100]!r}")
            self._name = name
        text, _ = ask("/metadata/scheduledevents?api-version=2020-07-01", header)
        for event in json.loads(text)["Events"]:
            if self._name in event["Resources"] and event["EventType"] in self.endings:
                return f"{event['EventType']}, not before {event.get('NotBefore') or 'now'}"
        return None


class Gcp:
    """Preemption of spot machines, 30 seconds ahead. The server holds its answer back until the value changes."""

    drain_s = 25

    def __init__(self) -> None:
        self._etag = _NO_ETAG

    def notice(self) -> str | None:
        etag, self._etag = self._etag, _NO_ETAG
        query = f"wait_for_change=true&timeout_sec={CHANGE_S}&last_etag={quote(etag)}"
        path = f"/computeMetadata/v1/instance/preempted?{query}"
        text, etag = ask(path, {"Metadata-Flavor": "Google"}, answer_s=CHANGE_S + ANSWER_S)
        if text not in ("TRUE", "FALSE"):
            raise ValueError(f"neither TRUE nor FALSE: {text[:100]!r}")
        self._etag = etag
        return "preemption" if text == "TRUE" else None


CLOUDS: dict[str, type[Cloud]] = {"aws": Aws, "azure": Azure, "gcp": Gcp}


def ask(path: str, headers: dict[str, str], method: str = "GET", answer_s: float = ANSWER_S) -> tuple[str, str]:
    """Return the text and the ETag of an answer of the metadata server. No proxy is used."""
    request = urllib.request.Request(METADATA + path, headers=headers, method=method)  # noqa: S310 - http:// of the cloud
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=answer_s) as answer:
        return answer.read(LONGEST).decode().strip(), answer.headers.get("ETag", _NO_ETAG)


def wait_for_notice(cloud: Cloud) -> str:
    """Return the cloud's notice when it comes. Print when the metadata server stops or begins to answer."""
    failed = ""
    while True:
        try:
            if notice := cloud.notice():
                return notice
            if failed:
                say(f"{METADATA} answers again")
            failed = ""
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
            if failed != (failed := f"{type(error).__name__}: {error}"):
                say(f"no valid answer of {METADATA}: {failed}; asking again every {POLL_S:g} s, the node goes on")
        time.sleep(POLL_S)


def main() -> int:
    name, *command = sys.argv[1:]
    if name not in CLOUDS:
        say(f"the cloud is {name!r}. Set it (SAGAN_CLOUD of node.sh) to one of {', '.join(CLOUDS)}")
        return 2
    cloud = CLOUDS[name]()
    drain = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(cloud.drain_s)}
    program: subprocess.Popen[bytes] | None = None
    leaving = threading.Event()

    def leave(*_: object) -> None:
        leaving.set()
        if program is not None:
            program.send_signal(signal.SIGTERM)

    def watch() -> None:
        say(f"the cloud takes this machine away: {wait_for_notice(cloud)}; the node drains")
        leave()

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    program = subprocess.Popen(command, env={**drain, **os.environ})
    if leaving.is_set():  # a signal came before the program began
        leave()
    threading.Thread(target=watch, daemon=True).start()
    code = program.wait()
    return 0 if leaving.is_set() else code if code >= 0 else 128 - code


def say(text: str) -> None:
    print(f"leave_at_notice: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
