"""An animation of the sample grids of a run."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from pipeline.report.stored_picture import stored_picture
from pipeline.runs.stored_run import StoredRun
from pipeline.storage import files

FRAMES, FRAME_WIDTH, FRAME_MS, LAST_MS = 16, 480, 500, 2000  # frames; width in px; duration of a frame in ms


def animate(run: StoredRun, out: Path) -> int:
    """Write a GIF of the sample grids of a run and return the number of frames. MLflow shows GIF files.

    The GIF has at most 16 frames: grids at even distances, including the last one. All frames have the palette of the
    last grid. Where the run has no grid, nothing is written.
    """
    urls = [url for record in run.scores() if files.exists(url := run.grid_url(record.checkpoint))]
    chosen = sorted({round(i * (len(urls) - 1) / (FRAMES - 1)) for i in range(FRAMES)}) if urls else []
    grids = [stored_picture(urls[i], FRAME_WIDTH) for i in chosen]
    if grids:
        colours = grids[-1].quantize(256)
        frames = [grid.quantize(palette=colours, dither=Image.Dither.NONE) for grid in grids]
        durations = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
        frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return len(grids)
