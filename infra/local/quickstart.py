"""The main job on this machine, through the front door: `make quickstart`, or `python -m infra.local.quickstart`.

Starts S3 and Ray, submits jobs/quickstart.yaml as anybody would, pulls the champion from the registry, draws its
samples and says what came out. Interrupted, the next start resumes; finished, the next start shows the result.
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

from infra.local.home import BUCKET, TRACKING_DB, end_on_sigterm, local_s3
from infra.local.server import BIN, CHECKOUT
from infra.local.servers import Ray
from pipeline.errors import InterruptedRun, SaganError

JOB = "jobs/quickstart.yaml"
RUN = Path("runs/quickstart")
out = Console()


def main() -> int:
    os.chdir(CHECKOUT)
    end_on_sigterm()
    started = time.monotonic()
    try:
        with local_s3() as s3:
            s3.bucket(BUCKET)
            TRACKING_DB.parent.mkdir(exist_ok=True)
            env = s3.env | {"MLFLOW_TRACKING_URI": f"sqlite:///{TRACKING_DB}"}
            with Ray(env=env) as ray:
                out.print(f"S3 {s3.url}, Ray {ray.address}; submitting {JOB}", highlight=False)
                submit(ray)
            shutil.rmtree(RUN / "champion", ignore_errors=True)
            sagan(env, "pull", "models:/quickstart@champion", str(RUN / "champion"))
            sagan(env, "sample", str(RUN / "champion"), "--out", str(RUN / "samples.png"), "--n", "100")
    except KeyboardInterrupt:
        out.print("interrupted; `make quickstart` resumes from the last checkpoint, `make clean` starts over")
        return InterruptedRun.exit_code
    except SaganError as error:
        out.print(str(error), style="red", markup=False)
        return error.exit_code
    show(json.loads((RUN / "summary.json").read_text()), time.monotonic() - started)
    return 0


def submit(ray: Ray) -> None:
    """`ray job submit`, until the job has ended. Interrupted, the job is stopped first, and writes its checkpoint.

    Raises SaganError where the job did not succeed.
    """
    # In a session of its own: Ctrl-C is for us, while it goes on showing how the job ends.
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
    statuses = set(ray.jobs().values())  # a stopped job's submitter exits with 0
    if submission.returncode or statuses != {"SUCCEEDED"}:
        raise SaganError(
            f"{JOB} did not succeed: {', '.join(statuses) or 'nothing was submitted'}", "its last lines say why"
        )


def sagan(env: dict[str, str], *arguments: str) -> None:
    out.print(f"$ sagan {' '.join(arguments)}", highlight=False, soft_wrap=True)
    done = subprocess.run([sys.executable, "-m", "pipeline", *arguments], env=os.environ | env)
    if done.returncode:
        raise SaganError(f"sagan {arguments[0]} ended with exit code {done.returncode}", "its last lines say why")


def show(summary: dict[str, Any], elapsed_s: float) -> None:
    score, registered = summary["score"], summary["registered"] or {}
    distance, accuracy = summary["fd_classifier"], summary["class_accuracy"]
    times_real = distance / summary["fd_classifier_real"]
    table = Table(show_header=False, title="quickstart", title_justify="left")
    for name, value in {
        f"score ({score['key']})": f"{score['value']:.4g}",
        "class accuracy": f"{accuracy:.1%} of the samples are recognised as what was asked for",
        "fd_classifier": f"{distance:.4g}, {times_real:.1f} × that of held-out real images",
        "training": f"{summary['images']} images in {summary['seconds']:.0f} s, {summary['images_per_s']:.0f} images/s",
        "everything": f"{elapsed_s:.0f} s since the servers were started",
        "samples": str(RUN / "samples.png"),
        "registry": f"models:/{registered.get('model')}@{registered.get('alias')}, version {registered.get('version')}",
        "summary": str(RUN / "summary.json"),
    }.items():
        table.add_row(name, value)
    out.print(table)
    plain: dict[str, Any] = {"soft_wrap": True, "highlight": False}
    database = TRACKING_DB.relative_to(CHECKOUT)
    out.print(f"metrics in a browser:   .venv/bin/mlflow ui --backend-store-uri sqlite:///{database}", **plain)
    out.print("pictures and models too, from the bucket:   .venv/bin/python -m infra.local --mlflow", **plain)


if __name__ == "__main__":
    sys.exit(main())
