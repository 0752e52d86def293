"""Writes the generator of another project's file as a model folder, for `sagan import`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import EnvironmentFault, UsageError, shown_url
from pipeline.image_grid import grid
from pipeline.importing import biggan_pytorch, mmgeneration, official_tf, studiogan
from pipeline.importing.choices import Choices
from pipeline.importing.foreign_tensors import ForeignTensors
from pipeline.importing.peer_generator import PeerGenerator, configuration, state_dict
from pipeline.importing.read_file import read_file
from pipeline.progress import progress
from pipeline.storage import file_sets, files
from pipeline.tracking import pulled_folder
from pipeline.tracking.model_card import model_card
from sagan.generator import Generator
from sagan.trained_model import Model, statistics_name


@dataclass(frozen=True)
class Peer:
    """A project whose files can be imported.

    Attributes:
        told: Returns the choices that the project's code fixes or that the names of the tensors tell.
        read: Reads the generator. The other choices are the user's.
    """

    told: Callable[[ForeignTensors], dict[str, Any]]
    read: Callable[[ForeignTensors, Choices], PeerGenerator]


PEERS = {
    "biggan-pytorch": Peer(biggan_pytorch.told, biggan_pytorch.read),
    "mmgeneration": Peer(mmgeneration.told, mmgeneration.read),
    "studiogan": Peer(studiogan.told, studiogan.read),
    "official-tf": Peer(official_tf.told, official_tf.read),
}

# What each choice is called on the command line, and where the user finds its value
_OPTIONS = {
    "weights": ("--weights", "ema or raw. Files with G_ema or generator_ema in their names hold the moving average"),
    "batch_norm_eps": (
        "--batch-norm-eps",
        "BigGAN-PyTorch's --BN_eps (1e-5 in its scripts); mmgeneration's norm_eps (1e-4 by default, 1e-5 in its best "
        "run)",
    ),
    "scale_offset": ("--scale-offset", "1 where mmgeneration's init_cfg is BigGAN or studio; 0 for SAGAN and SNGAN"),
    "channel_order": (
        "--channel-order",
        "bgr for files that mmgeneration trained; rgb for those that it converted from StudioGAN",
    ),
    "slope": ("--slope", "the negative slope of the rectifiers"),
}
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "weights": ("ema", "raw"),
    "scale_offset": (0, 1),
    "channel_order": ("rgb", "bgr"),
}
_SAMPLES = 16  # images in samples.png


def import_model(source: str, name: str, out: Path, given: dict[str, Any]) -> Model:
    """Read the generator in a file of another project, and write it to a folder as `sagan pull` writes one.

    Args:
        source: Path or URL of the file.
        name: Key of `PEERS`.
        out: The folder. An earlier import or pull in it is replaced.
        given: The user's values of `Choices`, by field name. None stands for no value.

    Raises UsageError where the file holds something else, sagan's generator cannot have its structure, or a choice is
    missing or contradicts the file. Raises EnvironmentFault where the file does not exist.
    """
    if name not in PEERS:
        raise UsageError(f"--from is {name!r}", f"choose one of: {', '.join(PEERS)}")
    if name == "official-tf":
        official_tf.require_safetensors(source)
    with _local(source) as path:
        tensors = read_file(path, shown_url(source))
        choices = _choices(name, PEERS[name].told(tensors), given)
        peer = PEERS[name].read(tensors, choices)
        digest = file_sets.FileEntry.of(path).sha256
    config = configuration(peer, choices.batch_norm_eps, choices.slope)
    generator = Generator(config, folded=True)
    generator.load_state_dict(state_dict(peer, config))
    for tensor_name, tensor in generator.state_dict().items():
        if not tensor.isfinite().all():
            raise tensors.refusal(f"{tensor_name} has values that float32 does not have")
    model = Model(config, generator, weights=choices.weights, batch_norm=statistics_name(None))
    origin = {"imported from": name, "file": files.name(shown_url(source)), "file sha256": digest, **asdict(choices)}
    with pulled_folder.replacing(out) as folder:
        _write(model, folder, out.absolute().name, origin)
    return model


def _write(model: Model, folder: Path, title: str, origin: dict[str, Any]) -> None:
    model.save(folder)
    (folder / "README.md").write_text(model_card(title, model, None, origin))
    labels = model.labels_for(None, _SAMPLES)
    captions = None if labels is None else [str(label) for label in labels.tolist()]
    grid(model.sample(n=_SAMPLES), captions, columns=4).save(folder / "samples.png")
    (folder / file_sets.MANIFEST).write_bytes(file_sets.Manifest.of(folder).to_bytes())


def _choices(name: str, told: dict[str, Any], given: dict[str, Any]) -> Choices:
    """Return the choices of the file and of the user. Raises UsageError that names the options."""
    given = {key: value for key, value in given.items() if value is not None}
    for key, value in given.items():
        if value not in _ALLOWED.get(key, (value,)) or (key not in _ALLOWED and not math.isfinite(value)):
            raise UsageError(f"{_OPTIONS[key][0]} is {value}", f"give {_OPTIONS[key][1]}")
        if told.get(key, value) != value:
            raise UsageError(
                f"{_OPTIONS[key][0]} is {value}, but the file or the code of {name} has {told[key]}",
                f"leave {_OPTIONS[key][0]} out",
            )
    values = {"slope": 0.0, **told, **given}
    if missing := [key for key in _OPTIONS if key not in values]:
        raise UsageError(
            f"the file does not tell {len(missing)} of the values that its images depend on",
            "; ".join(f"give {option}: {meaning}" for option, meaning in (_OPTIONS[key] for key in missing)),
        )
    return Choices(**values)


@contextmanager
def _local(source: str) -> Iterator[Path]:
    """Yield a local path of a file. Raises EnvironmentFault where it does not exist or cannot be downloaded."""
    missing = EnvironmentFault(f"there is no file at {source}", "give the path or the URL of the file")
    if files.is_local(source):
        if not (path := Path(files.local_path(source))).is_file():
            raise missing
        yield path
        return
    with files.temporary_folder("import") as folder:
        path = folder / files.name(shown_url(source))
        try:
            with progress(f"fetching {shown_url(source)}", files.size(source), "bytes") as advance:
                files.download(source, path, advance=advance)
        except FileNotFoundError:
            raise missing from None
        yield path
