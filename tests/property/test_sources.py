"""A folder, its tar and a bucket pack to the same bytes, and every file is packed or listed as left out.

A compressed archive is refused, except CIFAR's, which packs to the same bytes too.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import pickle
import re
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.collection.manifest import Collection
from pipeline.config.schema import PackSection
from pipeline.errors import UsageError
from pipeline.packing.pack import pack
from pipeline.storage import files
from tests.unit.packing.coloured_images import picture
from tests.unit.packing.read_collection import bytes_of

ODD = "ab é#%?&'\"$[]*{}~!@\\\n\udce9"
NAMES = st.text(ODD, min_size=1, max_size=4).filter(lambda name: name not in (".", ".."))
FOLDERS = st.one_of(NAMES, st.sampled_from(["train", "Testing", "val", "0", "10", "2", ".git", "@eaDir", "images"]))
SUFFIXES = st.sampled_from([".png", ".jpg", ".PNG", ".jfif", ".heic", ".txt", ""])
TREES = st.fixed_dictionaries(
    {
        "files": st.lists(st.tuples(st.lists(FOLDERS, max_size=2), NAMES, SUFFIXES), min_size=1, max_size=8),
        "hard": st.lists(st.integers(0, 7), max_size=2),
        "links": st.lists(st.tuples(st.integers(0, 7), st.booleans(), st.sampled_from("cde")), max_size=3),
    }
)


def build(root: Path, tree: dict) -> None:
    """Write the files, hard links to some of them, and links to files or their folders from a folder `linked`."""
    paths: list[Path] = []
    for n, (folders, name, suffix) in enumerate(tree["files"]):
        path = root.joinpath("base", *folders, name + suffix)
        if path.is_dir() or any(parent.is_file() for parent in path.parents):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(n, len(folders)))
        paths.append(path)
    for n, i in enumerate(tree["hard"]):
        path = paths[i % len(paths)]
        os.link(path, path.with_name(f"hard{n}{path.suffix}"))
    for n, (i, to_folder, name) in enumerate(tree["links"]):
        path = paths[i % len(paths)]
        link = root / "linked" / name / (f"folder{n}" if to_folder else f"file{n}{path.suffix}")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(path.parent if to_folder else path, link.parent))


def regular_files(root: Path) -> Iterator[str]:
    for folder, _, names in os.walk(root, followlinks=True):
        yield from (os.path.relpath(os.path.join(folder, name), root) for name in names)  # noqa: PTH118


def outcome(source: str, destination: Path) -> tuple[object, int]:
    """The bytes of the collection or the error, and the number of files in the table of packing."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            pack(str(destination), PackSection(source=source, resolution=32, max_broken=99))
    except UsageError as error:
        return error.message.replace(source, "SOURCE").replace("set/", ""), 0
    rows = re.findall(r"^(taken|left out) +([\d,]+)  ", out.getvalue(), re.MULTILINE)
    counts = [(what, int(count.replace(",", ""))) for what, count in rows]
    images = len((destination / "keys.txt").read_text().splitlines())
    assert images == len(Collection.open(str(destination)).labels)
    assert images == sum(count for what, count in counts if what == "taken"), "every image that is taken is packed"
    return bytes_of(destination), sum(count for _, count in counts)


def in_bucket(folder: Path) -> str:
    """The URL of a folder of a bucket with the files below `folder`."""
    bucket = f"memory://{uuid4().hex}/set"
    for name in regular_files(folder):
        files.upload(folder / name, f"{bucket}/{name}")
    return bucket


@settings(max_examples=25)
@given(tree=TREES)
def test_a_folder_its_tar_and_a_bucket_pack_alike(tree: dict) -> None:
    with tempfile.TemporaryDirectory() as temp:
        root = Path(temp) / "set"
        build(root, tree)
        with tarfile.open(f"{temp}/set.tar", "w") as tar:
            tar.add(root, "set")
        shutil.copytree(root, f"{temp}/copied", symlinks=False)
        bucket = in_bucket(Path(temp) / "copied")
        folder, count = outcome(str(root), Path(temp) / "1")
        assert outcome(f"{temp}/set.tar", Path(temp) / "2") == (folder, count)
        assert outcome(bucket, Path(temp) / "3") == (folder, count)
        if isinstance(folder, dict):
            assert count == len(list(regular_files(root))), "every file is taken or left out"
        shutil.move(f"{temp}/set.tar", f"{temp}/plain")
        (Path(temp) / "set.tar.gz").write_bytes(gzip.compress((Path(temp) / "plain").read_bytes()))
        with zipfile.ZipFile(f"{temp}/set.zip", "w") as archive:
            archive.writestr("a/1.png", picture(1))
        for name in ("set.tar.gz", "set.zip"):
            with pytest.raises(UsageError) as refused:
                pack(f"{temp}/4", PackSection(source=f"{temp}/{name}", resolution=32))
            assert "first" in refused.value.remedy, "unpack it first, or decompress it first"
            assert not (Path(temp) / "4" / "manifest.json").exists()


IMAGES = st.lists(st.tuples(st.integers(0, 255), st.integers(0, 2), st.sampled_from("123t")), min_size=1, max_size=8)


@settings(max_examples=15)
@given(images=IMAGES, protocol=st.sampled_from([2, 4]))
def test_cifar_packs_alike_as_a_folder_compressed_and_in_a_bucket(
    images: list[tuple[int, int, str]], protocol: int
) -> None:
    batches: dict[str, list[tuple[int, int, str]]] = {}
    for shade, label, batch in images:
        name = "test_batch" if batch == "t" else f"data_batch_{batch}"
        batches.setdefault(name, []).append((shade, label, f"{name}-{len(batches.get(name, []))}.png"))
    with tempfile.TemporaryDirectory() as temp:
        root = Path(temp) / "cifar-10-batches-py"
        root.mkdir()
        (root / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b", "c"]}, protocol))
        for name, rows in batches.items():
            data = np.stack([np.full(3072, shade, np.uint8) for shade, _, _ in rows])
            content = {"data": data, "labels": [row[1] for row in rows], "filenames": [row[2] for row in rows]}
            (root / name).write_bytes(pickle.dumps(content, protocol))
        with tarfile.open(f"{temp}/cifar-10-python.tar.gz", "w:gz") as tar:
            tar.add(root, root.name)
        folder, count = outcome(str(root), Path(temp) / "1")
        assert isinstance(folder, dict)
        assert len((Path(temp) / "1" / "keys.txt").read_text().splitlines()) == len(images)
        assert outcome(f"{temp}/cifar-10-python.tar.gz", Path(temp) / "2") == (folder, count)
        assert outcome(in_bucket(root), Path(temp) / "3") == (folder, count)
