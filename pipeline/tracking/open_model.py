"""Opens the generator of a registered model, a checkpoint or a folder."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.schema import EvaluateSection
from pipeline.errors import CorruptError, UsageError
from pipeline.runs.checkpoints import CHECKPOINT_FACTS, StoredCheckpoint, load_state
from pipeline.storage import file_sets, files
from pipeline.tracking import registry
from pipeline.tracking.mlflow_run import default_uri
from sagan.config import ModelConfig
from sagan.train_state import FACTS, TrainState
from sagan.trained_model import Model, check_class_names

_REMEDY = "give models:/NAME@ALIAS, a checkpoint's URL, or a folder that `sagan pull` wrote"


def open_model(
    where: str, device: str = "cpu", *, tracking_uri: str | None = None, section: EvaluateSection | None = None
) -> Model:
    """Open a model.

    Args:
        where: A registry URI (models:/NAME@ALIAS), the URL of a checkpoint, or a folder that `sagan pull` wrote.
        device: Device of the model.
        tracking_uri: MLflow tracking URI for a registry URI. Default: `default_uri()`.
        section: Its `weights`, `standing_images` and `seed` choose the generator of a checkpoint (see
            `Model.from_state`). Other models hold one generator.

    Raises UsageError, EnvironmentFault, CorruptError.
    """
    if where.startswith("models:/"):
        with files.temporary_folder("model") as temp:
            folder = registry.pull(tracking_uri or default_uri(), where, temp / "model")
            try:
                return Model.load(folder, device)
            except (FileNotFoundError, ValueError) as error:
                raise CorruptError(f"{where} cannot be opened: {error}", "register the model again") from error
    if files.exists(files.join(where, FACTS)):
        return model_of_checkpoint(StoredCheckpoint(where), section or EvaluateSection(), device)
    if files.is_local(where):
        file_sets.check_local_set(files.local_path(where))
        try:
            return Model.load(files.local_path(where), device)
        except (FileNotFoundError, ValueError) as error:
            raise UsageError(str(error), _REMEDY) from None
    raise UsageError(f"there is no model at {where}", _REMEDY)


def model_of_checkpoint(checkpoint: StoredCheckpoint, section: EvaluateSection, device: str = "cpu") -> Model:
    """Download and verify a checkpoint, and return the generator that a section describes.

    Raises CorruptError, EnvironmentFault.
    """
    state, class_names = load_checkpoint(checkpoint, device)
    return model_of_state(state, class_names, section)


def model_of_state(state: TrainState, class_names: list[str], section: EvaluateSection) -> Model:
    """Return the generator of a training state that a section describes."""
    return Model.from_state(
        state,
        weights=section.weights,
        standing_images=section.standing_images,
        seed=section.seed,
        class_names=class_names,
    )


def load_checkpoint(checkpoint: StoredCheckpoint, device: str = "cpu") -> tuple[TrainState, list[str]]:
    """Download and verify a checkpoint, and return its state and class names.

    The list of names is empty where the model is unconditional.

    Raises CorruptError, EnvironmentFault.
    """
    with files.temporary_folder("checkpoint") as temp:
        try:
            file_sets.fetch_set(checkpoint.url, temp)
        except FileNotFoundError as error:
            raise CorruptError(f"there is no complete checkpoint at {checkpoint.url}: {error}") from error
        state = load_state(temp, checkpoint.url, device)
        return state, class_names_of(temp, checkpoint.url, state.model)


def class_names_of(folder: Path, url: str, model: ModelConfig) -> list[str]:
    """Return the class names in a local folder to which the checkpoint at `url` was downloaded.

    The list is empty where the model is unconditional. Raises CorruptError.
    """
    facts = StoredCheckpoint(str(folder)).facts()
    names = facts.class_names if model.known_num_classes else []
    try:
        check_class_names(names, model.known_num_classes)
    except ValueError as error:
        raise CorruptError(f"{files.join(url, CHECKPOINT_FACTS)}: {error}") from error
    return names


def is_checkpoint(url: str) -> bool:
    """Return whether `url` is the URL of a checkpoint. Raises EnvironmentFault."""
    return files.exists(files.join(url, CHECKPOINT_FACTS))
