"""An animation of the sample grids of a run."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from pipeline.collection.image_codec import decode_image
from pipeline.errors import CorruptError
from pipeline.runs.stored_run import StoredRun
from pipeline.storage import files

MOST_BYTES = 2**26  # of a stored picture
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


def stored_picture(url: str, width: int) -> Image.Image:
    """Return a picture of a run, which somebody else may have stored, in RGB and reduced to a width.

    Raises FileNotFoundError, CorruptError where it is damaged or too large, and EnvironmentFault.
    """
    try:
        picture = decode_image(files.read_at_most(url, MOST_BYTES))
    except ValueError as error:
        raise CorruptError(f"{url} is not a picture: {error}", "delete it") from error
    picture.thumbnail((width, 4 * width), Image.Resampling.LANCZOS)
    return picture
