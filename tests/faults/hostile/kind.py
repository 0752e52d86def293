"""A kind of foreign input: a clean example, its changes and what reads it. Functions that several kinds share."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from pipeline import cli
from pipeline.storage.file_sets import MANIFEST, Manifest, read_manifest
from sagan.config import ModelConfig
from tests.faults.hostile.random_changes import changed_json

NETWORKS = ModelConfig(resolution=32, num_classes=2, z_dim=8, channels_g=2, channels_d=8)


Names = list[str]


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
        row: Row of the table that counts the inputs.
        share: Share of all inputs, relative to the other kinds.
        folder: Name of the folder with the clean input.
        change: Changes the copy of the clean input in a folder. Names lead to files of somebody else.
        read: Gives the input in the first folder to a public command, which writes to the second folder.
        is_right: Whether the files in the second folder, and what the command printed, are a right result.
    """

    row: str
    share: int
    folder: str
    change: Callable[[Path, Random, Names], object]
    read: Callable[[Path, Path], object]
    is_right: Callable[[Path, str], bool]


def command(*commands: str) -> Callable[[Path, Path], None]:
    """Return a function that runs `sagan` with each line of arguments.

    IN and OUT are the folders, and CLEAN is the folder with all clean inputs.
    """

    def read(source: Path, out: Path) -> None:
        places = {"IN": str(source), "OUT": str(out), "CLEAN": str(source.parents[2] / "clean")}
        for line in commands:
            words = (re.sub("IN|OUT|CLEAN", lambda place: places[place[0]], word) for word in line.split())
            sys.argv = ["sagan", *words]
            try:
                cli.main()
            except SystemExit as end:
                if end.code:
                    raise

    return read


# --- changes ----------------------------------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[..., bytes], random: Random, *names: Names) -> None:
    """Write the bytes that `change` makes of a file's bytes."""
    path.write_bytes(change(path.read_bytes(), random, *names))


def one_of(folder: Path, pattern: str, random: Random) -> Path:
    """Return one of the paths below a folder that match a pattern."""
    return random.choice(sorted(folder.glob(pattern)))


def change_json_file(pattern: str) -> Callable[[Path, Random, Names], None]:
    """Return a function that changes one of the JSON files of a folder."""
    return lambda folder, random, names: rewrite(one_of(folder, pattern, random), changed_json, random, names)


def refit(folder: Path) -> None:
    """Write the manifest of a set of files anew, with its facts."""
    facts = _facts(folder)
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / MANIFEST).write_bytes(Manifest.of(folder, **facts).to_bytes())


def _facts(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(str(folder))
    return {} if manifest is None else manifest.facts


# --- pictures and results ---------------------------------------------------------------------------------------------


def picture(number: int, side: int = 32, extension: str = "png", **options: Any) -> bytes:
    """Return the file of an image of noise. `options` are those of its format."""
    noise = np.random.default_rng(number).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    image = Image.fromarray(noise).resize((side, side))
    image.save(out, Image.registered_extensions()[f".{extension}"], **options)
    return out.getvalue()


def write_photos(folder: Path, count: int) -> None:
    """Write images of two classes, in a folder each."""
    for number in range(count):
        path = folder / ("ant", "bee")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))


def is_picture(out: Path, printed: str) -> bool:
    """Whether `samples.png` is an image."""
    with Image.open(out / "samples.png") as image:
        return min(image.size) >= 32


def is_json(out: Path, printed: str) -> bool:
    """Whether the command printed one JSON object without NaN and infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        return isinstance(json.loads(printed[printed.index("{") :], parse_constant=refuse), dict)
    except ValueError:
        return False
