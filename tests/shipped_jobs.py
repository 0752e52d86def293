"""The shipped jobs, and the variants that their headers name: `# variant   NAME: key=value key=value`."""

from __future__ import annotations

import re
from pathlib import Path

from tests.document_blocks import ROOT

JOBS = ROOT / "jobs"
STUDIES = sorted((JOBS / "studies").glob("*.yaml"))
_VARIANT = re.compile(r"^# variant +([\w.-]+): (\S+=\S+(?: \S+=\S+)*)$", re.MULTILINE)


def variants(job: Path) -> dict[str, list[str]]:
    """Name → overrides, as they are typed behind the job."""
    header, _, _ = job.read_text().partition("\nkind:")
    found = {name: keys.split() for name, keys in _VARIANT.findall(header)}
    assert len(found) == header.count("\n# variant "), f"{job.name}: write `# variant   NAME: key=value key=value`"
    return found


def shipped() -> dict[str, tuple[Path, list[str]]]:
    """Every job and every variant, `sagan128` and `sagan128 feat8`: (file, overrides)."""
    jobs = {job.stem: (job, variants(job)) for job in sorted(JOBS.glob("*.yaml"))}
    return {name: (job, []) for name, (job, _) in jobs.items()} | {
        f"{name} {variant}": (job, overrides)
        for name, (job, named) in jobs.items()
        for variant, overrides in named.items()
    }
