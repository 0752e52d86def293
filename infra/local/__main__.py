"""S3, Ray and optionally MLflow for a developer, until Ctrl-C: `python -m infra.local --help`."""

from __future__ import annotations

import shlex
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from infra.local.servers import Ray
from infra.local.state_folder import BUCKET, FOLDER, end_on_sigterm, local_mlflow, local_s3, mlflow_login_file
from pipeline.errors import SaganError


def main(
    mlflow: Annotated[bool, typer.Option(help="Also start an MLflow server for runs/mlflow.db.")] = False,
    folder: Annotated[
        Path, typer.Option(help="Folder for the S3 buckets and all credentials.", show_default=".local")
    ] = FOLDER,
    cpus: Annotated[int, typer.Option(min=1, help="Logical CPUs of the Ray head.")] = 4,
    s3_port: Annotated[int | None, typer.Option(help="Port of the S3 server.", show_default="any free port")] = None,
    ray_port: Annotated[int | None, typer.Option(help="Port of Ray's dashboard.", show_default="any free port")] = None,
) -> None:
    """Start an S3 server and a Ray head on loopback, print `export` lines, and wait for Ctrl-C.

    \b
    Examples for a second terminal, after you paste the lines into it:
      ray job submit jobs/quickstart.yaml   runs the job of the quickstart
      ray job stop JOB                      writes a checkpoint first
      sagan pack images/ s3://sagan/mine    packs your images into the bucket
    """
    out = Console()
    end_on_sigterm()
    try:
        with ExitStack() as servers:
            s3 = servers.enter_context(local_s3(folder, s3_port))
            s3.bucket(BUCKET)
            exports = dict(s3.env)
            if mlflow:
                tracking = servers.enter_context(local_mlflow(s3, folder))
                exports |= tracking.env
            leave = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "30"}  # Ctrl-C: time for jobs to write a checkpoint
            ray = servers.enter_context(Ray(cpus, env=exports | leave, port=ray_port))
            exports |= ray.env
            for name, value in exports.items():
                print(f"export {name}={shlex.quote(value)}")
            login = f", MLflow {tracking.uri} (user and password: {mlflow_login_file(folder)})" if mlflow else ""
            pages = f"Ray {ray.address}{login}"
            text = f"\nPaste these lines into another terminal. {pages}. Ctrl-C stops all servers."
            out.print(text, soft_wrap=True)
            signal.pause()
    except KeyboardInterrupt:
        out.print("stopped")
    except SaganError as error:
        out.print(str(error), style="red", markup=False)
        raise typer.Exit(error.exit_code) from None


if __name__ == "__main__":
    typer.run(main)
