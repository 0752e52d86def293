"""A folder, its tar and a bucket pack to the same bytes, and every file is packed or listed as left out."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config.schema import PackSection
from pipeline.errors import UsageError
from pipeline.packing.pack import pack
from pipeline.storage import files
from tests.unit.packing.coloured import picture
from tests.unit.packing.reading import bytes_of

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
    rows = re.findall(r"^(?:taken|left out) +([\d,]+)  ", out.getvalue(), re.MULTILINE)
    table = sum(int(row.replace(",", "")) for row in rows)
    return bytes_of(destination), table


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tree=TREES)
def test_a_folder_its_tar_and_a_bucket_pack_alike(tree: dict) -> None:
    with tempfile.TemporaryDirectory() as temp:
        root = Path(temp) / "set"
        build(root, tree)
        with tarfile.open(f"{temp}/set.tar", "w") as tar:
            tar.add(root, "set")
        shutil.copytree(root, f"{temp}/copied", symlinks=False)
        bucket = f"memory://{uuid4().hex}/set"
        for name in regular_files(Path(temp) / "copied"):
            files.upload(Path(temp) / "copied" / name, f"{bucket}/{name}")
        folder, count = outcome(str(root), Path(temp) / "1")
        assert outcome(f"{temp}/set.tar", Path(temp) / "2") == (folder, count)
        assert outcome(bucket, Path(temp) / "3") == (folder, count)
        if isinstance(folder, dict):
            assert count == len(list(regular_files(root))), "every file is taken or left out"
