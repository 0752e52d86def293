"""Writes the page about a run that has ended, and an animation of its sample grids."""

from __future__ import annotations

import io
import logging
import time
from pathlib import Path

from PIL import Image

from pipeline.compute.tasks import run_as_task
from pipeline.config.schema import TrainJob
from pipeline.report.write_report import write_report
from pipeline.runs.stored_run import StoredRun
from pipeline.storage import files
from pipeline.tracking.mlflow_run import MlflowRun, tracking_uri

log = logging.getLogger(__name__)

COMPARED = 2000  # largest number of generated images; a job with fewer `evaluate.samples` compares that many
FRAMES, FRAME_WIDTH, FRAME_MS, LAST_MS = 16, 480, 500, 2000  # frames; width in px; duration of a frame in ms
DELIVERY_S = 30.0  # seconds to wait for MLflow


def publish_report(job: TrainJob, run_id: str) -> None:
    """Write the page and the animation into the run's folder and its MLflow run. A failure is logged and not raised.

    Where `evaluate.gpus` asks for a GPU, the work runs in a task of the cluster.
    """
    run, began = StoredRun.of(job), time.monotonic()
    try:
        if job.evaluate.gpus and job.evaluate.workers == 1:
            run_as_task(_publish, job, run_id, cpus=job.evaluate.cpus, gpus=job.evaluate.gpus)
        else:
            _publish(job, run_id)
    except Exception as error:
        log.warning(
            "the page about %s could not be written: %s; write it with `sagan report %s`", job.name, error, run.url
        )
    else:
        print(f"wrote the page {run.report_url} in {time.monotonic() - began:.0f} s", flush=True)


def _publish(job: TrainJob, run_id: str) -> None:
    run = StoredRun.of(job)
    with files.temporary_folder("report") as temp:
        page, grids = temp / files.name(run.report_url), temp / files.name(run.animation_url)
        write_report([run.url], page, min(COMPARED, job.evaluate.samples))
        files.upload(page, run.report_url)
        if animate(run, grids):
            files.upload(grids, run.animation_url)
        tracker = MlflowRun(tracking_uri(job), run_id)
        for path in (page, grids):
            if path.exists():
                tracker.log_file(path)
        tracker.close(DELIVERY_S)


def animate(run: StoredRun, out: Path) -> int:
    """Write a GIF of the sample grids of a run and return the number of frames. MLflow shows GIF files.

    The GIF has at most 16 frames: grids at even distances, including the last one. All frames have the palette of the
    last grid. Where the run has no grid, nothing is written.
    """
    urls = [url for record in run.scores() if files.exists(url := run.grid_url(record.checkpoint))]
    chosen = sorted({round(i * (len(urls) - 1) / (FRAMES - 1)) for i in range(FRAMES)}) if urls else []
    grids = [_small(urls[i]) for i in chosen]
    if grids:
        colours = grids[-1].quantize(256)
        frames = [grid.quantize(palette=colours, dither=Image.Dither.NONE) for grid in grids]
        durations = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
        frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return len(grids)


def _small(grid: str) -> Image.Image:
    """Return the grid at the URL `grid`, reduced to FRAME_WIDTH."""
    with Image.open(io.BytesIO(files.read_bytes(grid))) as image:
        small = image.convert("RGB")
    small.thumbnail((FRAME_WIDTH, 4 * FRAME_WIDTH), Image.Resampling.LANCZOS)
    return small
