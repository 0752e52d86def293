"""A ready generator from wherever somebody has one."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.storage import files, fileset
from pipeline.tracking import registry
from pipeline.tracking.tracker import default_uri
from sagan.sampling import Model
from sagan.state import FACTS, TrainState


def open_model(
    where: str,
    device: str = "cpu",
    *,
    tracking_uri: str | None = None,
    weights: str = "ema",
    standing_images: int | None = 4096,
    seed: int = 0,
) -> Model:
    """The model behind a registry URI (models:/NAME@ALIAS), a checkpoint's URL or a folder that `sagan pull` wrote.

    `weights`, `standing_images` and `seed` say which generator of a checkpoint it is (see `Model.from_state`); other
    models have been made. Raises UsageError, EnvironmentFault, CorruptError.
    """
    with tempfile.TemporaryDirectory(prefix="sagan-model-") as temp:
        folder = Path(temp) / "model"
        if where.startswith("models:/"):
            return Model.load(registry.pull(tracking_uri or default_uri(), where, folder), device)
        if files.exists(files.join(where, FACTS)):
            return of_checkpoint(where, device, weights=weights, standing_images=standing_images, seed=seed)
        if files.is_local(where):
            try:
                return Model.load(Path(where.removeprefix("file://")).expanduser(), device)
            except (FileNotFoundError, ValueError) as error:
                raise UsageError(str(error), _HOW) from None
    raise UsageError(f"there is no model at {where}", _HOW)


def of_checkpoint(url: str, device: str = "cpu", *, weights: str, standing_images: int | None, seed: int) -> Model:
    """A generator of a checkpoint, verified. Raises FileNotFoundError, CorruptError, EnvironmentFault."""
    state, names = state_of(url, device)
    return Model.from_state(state, weights=weights, standing_images=standing_images, seed=seed, class_names=names)


def state_of(url: str, device: str = "cpu") -> tuple[TrainState, list[str]]:
    """State and class names (none when unconditional) of a checkpoint, verified. Raises as `of_checkpoint`."""
    with tempfile.TemporaryDirectory(prefix="sagan-checkpoint-") as temp:
        fileset.fetch(url, Path(temp))
        state = TrainState.load(temp, device)
        facts = files.read_json(f"{temp}/checkpoint.json")
    return state, facts["class_names"] if state.model.labels else []


_HOW = "give models:/NAME@ALIAS, a checkpoint's URL, or a folder that `sagan pull` wrote"
