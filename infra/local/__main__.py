"""S3 and Ray for a developer, until Ctrl-C: `python -m infra.local --help`."""

from __future__ import annotations

import shlex
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from infra.local.home import BUCKET, FOLDER, TRACKING_DB, end_on_sigterm, local_s3
from infra.local.servers import MlflowServer, Ray
from pipeline.errors import SaganError


def main(
    mlflow: Annotated[bool, typer.Option(help="Serve the runs and models of runs/mlflow.db too.")] = False,
    folder: Annotated[
        Path, typer.Option(help="What the S3 server keeps, with its credentials.", show_default=".local")
    ] = FOLDER,
    cpus: Annotated[int, typer.Option(min=1, help="Logical CPUs of the Ray head: tasks side by side.")] = 4,
    s3_port: Annotated[int | None, typer.Option(help="Port of the S3 server.", show_default="any free one")] = None,
    ray_port: Annotated[int | None, typer.Option(help="Port of Ray's dashboard.", show_default="any free one")] = None,
) -> None:
    """Start an S3 server and a Ray head on loopback, print what to paste, and wait for Ctrl-C.

    \b
    Examples, from a second terminal after pasting:
      ray job submit jobs/quickstart.yaml   the main job, as the quickstart runs it
      ray job stop JOB                      it writes a checkpoint first
      sagan pack images/ s3://sagan/mine    your own images into the bucket
    """
    out = Console()
    end_on_sigterm()
    try:
        with ExitStack() as servers:
            s3 = servers.enter_context(local_s3(folder, s3_port))
            s3.bucket(BUCKET)
            exports = dict(s3.env)
            if mlflow:
                artifacts = f"s3://{BUCKET}/mlflow"
                tracking = servers.enter_context(MlflowServer(TRACKING_DB.parent, artifacts=artifacts, env=s3.env))
                exports["MLFLOW_TRACKING_URI"] = tracking.uri
            ray = servers.enter_context(Ray(cpus, env=exports, port=ray_port))
            exports |= ray.env
            for name, value in exports.items():
                print(f"export {name}={shlex.quote(value)}")
            pages = f"Ray {ray.address}" + (f", MLflow {tracking.uri}" if mlflow else "")
            out.print(f"\nPaste these lines into another terminal. {pages}. Ctrl-C ends everything.", soft_wrap=True)
            signal.pause()
    except KeyboardInterrupt:
        out.print("stopped")
    except SaganError as error:
        out.print(str(error), style="red", markup=False)
        raise typer.Exit(error.exit_code) from None


if __name__ == "__main__":
    typer.run(main)
