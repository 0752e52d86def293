"""The command that `sagan pack` prints to run next works for every layout, as a shell and the command line read it."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipeline import cli
from pipeline.config.schema import PackSection
from pipeline.errors import UsageError
from pipeline.packing.pack import pack
from pipeline.storage import files
from tests.unit.packing.coloured_images import picture, png, tar, write

CHECKOUT = Path(__file__).parents[2]
pytestmark = pytest.mark.system

PHOTOS = {f"{name}/{n}.png": picture(n, ord(name)) for name in "ab" for n in range(3)}


def shell_words(command: str) -> list[str]:
    """The arguments that a shell gives to `sagan` for a command line that begins with it."""
    function = 'sagan() { printf "%s\\0" "$@"; }\n'
    done = subprocess.run(["bash", "-c", function + command], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def require_next_command_works(
    destination: str, section: PackSection, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pack, and run what is printed to run next as a dry run, which opens the collection and its split."""
    monkeypatch.setenv("SAGAN_BUCKET", "runs")
    collection = pack(destination, section)
    (command,) = re.findall(r"^next: (.+)$", capsys.readouterr().out, re.MULTILINE)
    result = CliRunner().invoke(cli.app, [*shell_words(command), "--dry-run", "--json"])
    assert result.exit_code == 0, (command, result.exception)
    facts = json.loads(result.stdout)
    assert (facts["resolution"], facts["num_classes"]) == (collection.resolution, collection.num_classes), command
    assert facts["epochs"] > 0, "the collection and its split were found"


# --- every layout ----------------------------------------------------------------------------------------------------


def parquet(folder: Path, name: str, split: str = "train", **columns: Any) -> Path:
    (folder / name).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / name / f"{split}-00000-of-00001.parquet")
    return folder / name


def shards(folder: Path, name: str, members: Callable[[int], dict[str, bytes]], image: bytes | None = None) -> Path:
    """Three numbered WebDataset shards of two samples each."""
    for shard in range(3):
        samples = range(2 * shard, 2 * shard + 2)
        contents = {f"{n:04d}.png": image or picture(n) for n in samples}
        for n in samples:
            contents |= {f"{n:04d}.{suffix}": data for suffix, data in members(n).items()}
        write(folder / name, {f"{name}-{shard:05d}.tar": tar(dict(sorted(contents.items())))})
    return folder / name


def cifar(folder: Path) -> Path:
    rows = np.zeros((2, 3072), np.uint8)
    rows[1] = 200
    batch = {"data": rows, "labels": [0, 1], "filenames": ["a.png", "b.png"]}
    batches = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    contents = {
        name: pickle.dumps(batch | {"filenames": [f"{name}-{n}.png" for n in range(2)]}, protocol=2) for name in batches
    }
    meta = pickle.dumps({"label_names": ["cat", "dog"]}, protocol=2)
    return write(folder / "cifar-10-batches-py", {**contents, "batches.meta": meta})


def compressed_cifar(folder: Path) -> Path:
    batches = cifar(folder)
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as file:
        file.add(batches, "cifar-10-batches-py")
    return folder / "cifar-10-python.tar.gz"


def cifar_100(folder: Path) -> Path:
    batch = {"fine_labels": [99, 0], "coarse_labels": [1, 1], "filenames": ["a.png", "b.png"]}
    batch["data"] = np.stack([np.full(3072, n, np.uint8) for n in (7, 8)])
    meta = {"fine_label_names": [f"class{i}" for i in range(100)], "coarse_label_names": ["x", "y"]}
    return write(folder / "cifar-100-python", {"train": pickle.dumps(batch), "meta": pickle.dumps(meta)})


def tiny_imagenet(folder: Path) -> Path:
    images = {f"train/{wnid}/images/{wnid}_0.JPEG": picture(n) for n, wnid in enumerate(("n01443537", "n01629819"))}
    notes = {"val/val_annotations.txt": "val_0.JPEG\tn01629819\t0\t0\t1\t1\n", "words.txt": "n01443537\tgoldfish\n"}
    return write(folder / "tiny", {**images, "val/images/val_0.JPEG": picture(9), **notes})


def celeba(folder: Path) -> Path:
    rows = "2\nSmiling Young \n000001.jpg -1  1\n000002.jpg  1 -1\n"
    images = {f"img_align_celeba/00000{n}.jpg": picture(n) for n in (1, 2)}
    return write(folder / "celeba", {**images, "list_attr_celeba.txt": rows})


def lsun(folder: Path, *categories: str) -> Path:
    return write(folder / "lsun", {f"{c}_train/{n:x}{'0' * 39}.webp": picture(n) for n, c in enumerate(categories)})


def table(folder: Path, name: str, text: str | bytes) -> Path:
    write(folder / "table", {**PHOTOS, name: text})
    return folder / "table" / name


def inside(folder: Path, *folders: str) -> Path:
    return write(folder / "set", {f"{split}/{path}": data for split in folders for path, data in PHOTOS.items()})


def table_of_parquet(folder: Path) -> Path:
    write(folder / "set", PHOTOS)
    pq.write_table(pa.table({"path": list(PHOTOS), "label": list(range(6))}), folder / "set" / "labels.parquet")
    return folder / "set" / "labels.parquet"


LAYOUTS: dict[str, Callable[[Path], object]] = {
    "folders of classes": lambda f: write(f / "set", PHOTOS),
    "a folder of images": lambda f: write(f / "set", {f"{n}.png": picture(n) for n in range(3)}),
    "one class": lambda f: write(f / "set", {f"only/{n}.png": picture(n) for n in range(3)}),
    "numbered classes": lambda f: write(f / "set", {f"{n}/0.png": picture(n) for n in (0, 2, 10, 11)}),
    "train and test": lambda f: inside(f, "train", "test"),
    "capital splits": lambda f: inside(f, "Training", "Testing"),
    "no train": lambda f: inside(f, "validation", "test"),
    "one split": lambda f: inside(f, "val"),
    "named splits": lambda f: {"heldout": str(write(f / "1", PHOTOS)), "day.one-2_": str(write(f / "2", PHOTOS))},
    "a tar": lambda f: write(f, {"set.tar": tar(PHOTOS)}) / "set.tar",
    "a tar of tars": lambda f: (
        write(f, {"set.tar": tar({f"{c}.tar": tar({"1.png": picture(1)}) for c in "ab"})}) / "set.tar"
    ),
    "a folder of tars": lambda f: write(f / "set", {f"{c}.tar": tar({"1.png": picture(1)}) for c in "ab"}),
    "CIFAR-10": cifar,
    "CIFAR-10, compressed": compressed_cifar,
    "CIFAR-100": cifar_100,
    "Tiny ImageNet": tiny_imagenet,
    "CelebA": celeba,
    "an attribute of CelebA": lambda f: f"{celeba(f)}/list_attr_celeba.txt#Smiling",
    "LSUN": lambda f: lsun(f, "bedroom"),
    "LSUN, two categories": lambda f: lsun(f, "bedroom", "church_outdoor"),
    "StyleGAN": lambda f: write(
        f / "set",
        {
            "00000/a.png": picture(0),
            "00001/b.png": picture(1),
            "dataset.json": json.dumps({"labels": [["00000/a.png", 4], ["00001/b.png", 2]]}),
        },
    ),
    "FFHQ": lambda f: write(f / "set", {f"{n:05d}/{n + 5:05d}.png": picture(n // 1000) for n in (0, 1000, 2000)}),
    "shards with numbers": lambda f: shards(f, "s", lambda n: {"cls": b"%d" % (n % 3)}),
    "shards with words": lambda f: shards(f, "s", lambda n: {"json": json.dumps({"label": "ab"[n % 2]}).encode()}),
    "shards without labels": lambda f: shards(f, "s", lambda n: {"txt": b"caption"}),
    "Parquet": lambda f: parquet(f, "hf", image=[picture(1), picture(2)], label=[0, 1]),
    "Parquet, test only": lambda f: parquet(f, "hf", "test", image=[picture(1), picture(2)], label=["a", "b"]),
    "a table": lambda f: table(f, "t.csv", "path,label\na/0.png,cat\nb/0.png,dog\n"),
    "a column of a table": lambda f: (
        f"{table(f, 't.tsv', 'path	x	y' + chr(10) + 'a/0.png	1	b' + chr(10))}#y"
    ),
    "a table in UTF-16": lambda f: table(f, "t.txt", "path;label\na/0.png;café\nb/0.png;thé\n".encode("utf-16")),
    "a table of Parquet": table_of_parquet,
    "odd classes": lambda f: write(f / "set", {f"{c}/1.png": picture(1) for c in ("a b", "it's", "$x", "é\n", "#")}),
    "digits": lambda f: "digits",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_every_layout(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source: Any = LAYOUTS[layout](tmp_path / "source")
    section = PackSection(source=source if isinstance(source, dict) else str(source), resolution=32)
    require_next_command_works(f"{tmp_path}/packed", section, capsys, monkeypatch)


@pytest.mark.parametrize("resolution", [32, 64, 128, 256])
@pytest.mark.parametrize("classes", [0, 2, 1000])
def test_of_every_resolution_and_number_of_classes(
    resolution: int,
    classes: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = picture(7)
    source = write(tmp_path / "source", {f"c{i}/1.png" if classes else "1.png": image for i in range(classes or 1)})
    monkeypatch.chdir(CHECKOUT)
    section = PackSection(source=str(source), resolution=resolution)
    require_next_command_works(f"{tmp_path}/packed", section, capsys, monkeypatch)


def test_of_shards_that_are_indexed_in_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = shards(tmp_path, "it's #2", lambda n: {"cls": b"%d" % (n % 2)}, png(32, 32))
    section = PackSection(source=str(place), index_only=True)
    require_next_command_works(str(place), section, capsys, monkeypatch)


def test_of_a_bucket(
    s3: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3.bucket()
    for name, data in PHOTOS.items():
        files.write_bytes(f"{bucket}/my set/{name}", data)
    section = PackSection(source=f"{bucket}/my set", resolution=64)
    require_next_command_works(f"{bucket}/it's #2?x=$y", section, capsys, monkeypatch)


# --- every case that people reported ---------------------------------------------------------------------------------

CASES = [
    "capital-splits/mri",
    "csv-dot-slash/find.csv",
    "csv-dot-slash/places365.txt",
    "csv-dot-slash/windows.csv",
    "csv-excel/bom.csv",
    "csv-excel/quoted.csv",
    "csv-excel/semicolon.csv",
    "csv-excel/utf16.csv",
    "csv-no-extension/labels.csv",
    "eadir/pets",
    "ffhq/thumbnails128x128",
    "jfif/pets",
    "latin1-folder/set",
    "numeric-folders/set",
    "own-digits/digits",
    "splits-training/set",
    "stylegan/set",
    "tar-links/photos",
    "tar-links/photos.tar",
    "wds-dotted-keys",
]
REFUSED = ["csv-excel/cp1252.csv", "parquet-lfs-pointer/repo", "parquet-truncated/x.parquet", "wds-cards"]


@pytest.fixture(scope="module")
def cases(test_data: Path | None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    archive = test_data and test_data.parent / "cases" / "cases.tar.gz"
    if not (archive and archive.is_file()):
        pytest.skip("there is no cases/cases.tar.gz beside the folder that SAGAN_TEST_DATA names")
    folder = tmp_path_factory.mktemp("cases")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_of_every_case(
    case: str, cases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    section = PackSection(source=str(cases / case), resolution=32)
    require_next_command_works(f"{tmp_path}/packed", section, capsys, monkeypatch)


@pytest.mark.parametrize("case", REFUSED)
def test_the_other_cases_are_refused(case: str, cases: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        pack(f"{tmp_path}/packed", PackSection(source=str(cases / case), resolution=32))
