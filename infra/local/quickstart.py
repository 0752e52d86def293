"""The quickstart on this machine: `make quickstart`, or `python -m infra.local.quickstart`.

It starts S3 and Ray, submits jobs/quickstart.yaml with `ray job submit`, pulls the champion from the registry, draws
its samples and prints the results. A start after an interruption resumes the job. A start after the end of the job
shows the results again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from infra.local.server_process import BIN, CHECKOUT
from infra.local.servers import Ray
from infra.local.state_folder import BUCKET, TRACKING_DB, end_on_sigterm, local_s3
from pipeline.config.locations import sqlite_uri
from pipeline.errors import InterruptedRun, SaganError

JOB = "jobs/quickstart.yaml"
RUN = Path("runs/quickstart")
out = Console()


def main() -> int:
    """Run the quickstart and return the exit code."""
    os.chdir(CHECKOUT)
    end_on_sigterm()
    started = time.monotonic()
    try:
        with local_s3() as s3:
            s3.bucket(BUCKET)
            TRACKING_DB.parent.mkdir(exist_ok=True)
            env = s3.env | {"MLFLOW_TRACKING_URI": sqlite_uri(TRACKING_DB)}
            with Ray(env=env) as ray:
                out.print(f"S3 {s3.url}, Ray {ray.address}; submitting {JOB}", highlight=False)
                submit(ray)
            shutil.rmtree(RUN / "champion", ignore_errors=True)
            sagan(env, "pull", "models:/quickstart@champion", str(RUN / "champion"))
            sagan(env, "sample", str(RUN / "champion"), "--out", str(RUN / "samples.png"), "--n", "100")
    except KeyboardInterrupt:
        out.print(
            "interrupted; `make quickstart` resumes from the last checkpoint; `make clean` deletes all local runs"
        )
        return InterruptedRun.exit_code
    except SaganError as error:
        out.print(str(error), style="red", markup=False)
        return error.exit_code
    show(json.loads((RUN / "summary.json").read_text()), time.monotonic() - started)
    return 0


def submit(ray: Ray) -> None:
    """Run `ray job submit` and wait until the job has ended.

    KeyboardInterrupt stops the job, which writes a checkpoint first. Raises SaganError where the job did not succeed.
    """
    # In a separate session, Ctrl-C does not reach `ray job submit`, which then shows how the job ends.
    submission = subprocess.Popen(
        [str(BIN / "ray"), "job", "submit", JOB], env=os.environ | ray.env, start_new_session=True
    )
    try:
        submission.wait()
    except KeyboardInterrupt:
        if ray.stop_jobs():
            out.print("stopping the job; it writes a checkpoint first")
            submission.wait()
        raise
    finally:
        submission.kill()
    statuses = set(ray.jobs().values())  # `ray job submit` exits with 0 for a stopped job
    if submission.returncode or statuses != {"SUCCEEDED"}:
        raise SaganError(
            f"{JOB} did not succeed: {', '.join(statuses) or 'nothing was submitted'}",
            "read the last lines of its output above",
        )


def sagan(env: dict[str, str], *arguments: str) -> None:
    """Run a `sagan` command with additional environment variables. Raises SaganError where it fails."""
    out.print(f"$ sagan {' '.join(arguments)}", highlight=False, soft_wrap=True)
    done = subprocess.run([sys.executable, "-m", "pipeline", *arguments], env=os.environ | env)
    if done.returncode:
        raise SaganError(
            f"sagan {arguments[0]} ended with exit code {done.returncode}", "read the last lines of its output above"
        )


def show(summary: dict[str, Any], elapsed_s: float) -> None:
    """Print a table of the results."""
    score, registered = summary["score"], summary["registered"] or {}
    distance, accuracy = summary["fd_classifier"], summary["class_accuracy"]
    times_real = distance / summary["fd_classifier_real"]
    table = Table(show_header=False, title="quickstart", title_justify="left")
    for name, value in {
        f"score ({score['metric']})": f"{score['value']:.4g}",
        "class accuracy": f"the classifier assigns {accuracy:.1%} of the samples to their class",
        "fd_classifier": f"{distance:.4g}, which is {times_real:.1f} × the value of held-out real images",
        "training": f"{summary['images']} images in {summary['seconds']:.0f} s, {summary['images_per_s']:.0f} images/s",
        "total time": f"{elapsed_s:.0f} s, including the start of the servers",
        "samples": str(RUN / "samples.png"),
        "registry": f"models:/{registered.get('model')}@{registered.get('alias')}, version {registered.get('version')}",
        "summary": str(RUN / "summary.json"),
    }.items():
        table.add_row(name, value)
    out.print(table)
    text = "to see metrics, pictures and models in a browser:   .venv/bin/python -m infra.local --mlflow"
    out.print(text, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
