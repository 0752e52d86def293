"""What there is to look at when a run has ended, in its folder and in its MLflow run: the page, and grids that move."""

from __future__ import annotations

import io
import logging
import tempfile
import time
from pathlib import Path

from PIL import Image

from pipeline.config.schema import TrainJob
from pipeline.evaluation import evaluate
from pipeline.report import report
from pipeline.storage import files
from pipeline.storage.run_folder import RunFolder
from pipeline.tracking.tracker import Tracker, tracking_uri

log = logging.getLogger(__name__)

COMPARED = 2000  # generated images at most, and never more than a score takes
FRAMES, FRAME_WIDTH, FRAME_MS, LAST_MS = 16, 480, 500, 2000
DELIVERY_S = 30.0


def publish(job: TrainJob, run_id: str) -> None:
    """Write both, into `<root>/<name>/` and to the tracker, on what evaluation gets. A failure is said, not raised."""
    began = time.monotonic()
    try:
        evaluate.with_resources(job.evaluate, _publish, job, run_id)
    except Exception as error:
        log.warning("%s has no page: %s; `sagan report %s` writes one", job.name, error, job.folder.url)
    else:
        print(f"{job.folder.report}: what there is to look at, written in {time.monotonic() - began:.0f} s", flush=True)


def _publish(job: TrainJob, run_id: str) -> None:
    with tempfile.TemporaryDirectory(prefix="sagan-report-") as temp:
        page, grids = Path(temp) / files.name(job.folder.report), Path(temp) / files.name(job.folder.animation)
        report.write([job.folder.url], page, min(COMPARED, job.evaluate.samples))
        files.upload(page, job.folder.report)
        if animate(job.folder, grids):
            files.upload(grids, job.folder.animation)
        tracker = Tracker(tracking_uri(job), run_id)
        for path in (page, grids):
            if path.exists():
                tracker.artifact(path)
        tracker.close(DELIVERY_S)


def animate(folder: RunFolder, out: Path) -> int:
    """Write the sample grids of a run one after another as a GIF, which MLflow shows; returns how many.

    At most 16 of them, evenly chosen, the last included; none where there is no grid. All have the last one's colours.
    """
    urls = [url for name in folder.scored() if files.exists(url := folder.grid(name))]
    chosen = sorted({round(i * (len(urls) - 1) / (FRAMES - 1)) for i in range(FRAMES)}) if urls else []
    grids = [_small(urls[i]) for i in chosen]
    if grids:
        colours = grids[-1].quantize(256)
        frames = [grid.quantize(palette=colours, dither=Image.Dither.NONE) for grid in grids]
        durations = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
        frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return len(grids)


def _small(grid: str) -> Image.Image:
    with Image.open(io.BytesIO(files.read_bytes(grid))) as image:
        small = image.convert("RGB")
    small.thumbnail((FRAME_WIDTH, 4 * FRAME_WIDTH), Image.Resampling.LANCZOS)
    return small
