"""Decides which version of a model has the alias `champion`.

MLflow sets an alias without compare-and-swap. So `promote_best` sets the alias and reads it again until it names the
best version.
"""

from __future__ import annotations

import logging
from contextlib import suppress

from pipeline.errors import SaganError, UsageError
from pipeline.tracking.mlflow_run import client
from pipeline.tracking.registry import ATTEMPTS, CHAMPION, Version, champion_of, registry_errors, versions

log = logging.getLogger(__name__)


def promote_best(uri: str, name: str) -> int | None:
    """Set `champion` to the best READY version that is not withdrawn.

    Versions are compared under the protocol key of the newest version; versions without a score under this key are not
    considered. A champion without such a score cannot be compared and keeps the alias.

    Returns the number of the champion; None where there is no champion. Raises EnvironmentFault where MLflow cannot be
    used, and SaganError where other processes undo the change in every attempt.
    """
    from mlflow.exceptions import MlflowException

    with registry_errors(uri):
        mlflow = client(uri)
        for _ in range(ATTEMPTS):
            eligible = [v for v in versions(uri, name) if v.ready and "withdrawn" not in v.tags]
            champion = champion_of(uri, name)
            if not eligible:
                return champion.number if champion else None
            newest = eligible[-1]
            if champion and "withdrawn" not in champion.tags and not champion.compares(newest):
                log.warning(
                    "the champion of %s stays version %d, because that version has no score under %s; compare the "
                    "versions yourself, and set the champion with `sagan promote`",
                    name,
                    champion.number,
                    newest.metric,
                )
                return champion.number
            best = min(eligible, key=lambda version: (version.rank(newest), version.number))
            if champion and champion.number == best.number:
                return best.number
            with suppress(MlflowException):  # another process set the alias at the same moment
                mlflow.set_registered_model_alias(name, CHAMPION, str(best.number))
    raise SaganError(
        f"the champion of {name} could not be set in {ATTEMPTS} attempts",
        f"set it with: sagan promote {name} {best.number}",
    )


def promote(uri: str, name: str, version: int, force_reason: str | None = None) -> int:
    """Set `champion` to a version that a person chose, and return its number.

    Without `force_reason`, the version must be better than the champion under the champion's protocol. With
    `force_reason`, all newer versions and all better versions are tagged withdrawn. `promote_best` does not choose a
    withdrawn version. The chosen version is no longer withdrawn.

    Raises UsageError where the version does not exist, is not READY or is not better; EnvironmentFault where MLflow
    cannot be used.
    """
    with registry_errors(uri):
        mlflow = client(uri)
        all_versions = versions(uri, name)
        chosen = next((v for v in all_versions if v.number == version and v.ready), None)
        if chosen is None:
            numbers = ", ".join(str(v.number) for v in all_versions if v.ready) or "none"
            raise UsageError(f"{name} has no version {version} that is READY", f"choose one of: {numbers}")
        champion = champion_of(uri, name)
        if force_reason is None and champion is not None and champion.number != version:
            _require_better(name, chosen, champion)
        if force_reason is not None:
            for other in all_versions:
                wins = other.rank(chosen) < chosen.rank(chosen)
                if other.number > version or wins:
                    mlflow.set_model_version_tag(name, str(other.number), "withdrawn", force_reason)
            mlflow.set_model_version_tag(name, str(version), "promoted", force_reason)
        if "withdrawn" in chosen.tags:
            mlflow.delete_model_version_tag(name, str(version), "withdrawn")
        mlflow.set_registered_model_alias(name, CHAMPION, str(version))
        return version


def _require_better(name: str, chosen: Version, champion: Version) -> None:
    """Check that `chosen` is better than the champion under the champion's protocol. Raises UsageError."""
    if not chosen.compares(champion):
        problem = "and the champion were scored under different protocols, so they cannot be compared"
    elif chosen.rank(champion) >= champion.rank(champion):
        problem = "is not better than the champion under the same protocol"
    else:
        return
    descriptions = f"{chosen.described(champion)}\n  {champion.described(champion)}"
    raise UsageError(
        f"version {chosen.number} of {name} {problem}\n  {descriptions}",
        f'to promote it anyway, give a reason: sagan promote {name} {chosen.number} --force "…"',
    )
