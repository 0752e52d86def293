from __future__ import annotations

import io
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.errors import UsageError
from pipeline.packing.image_source import Source
from pipeline.packing.recognise import open_source
from pipeline.storage import files
from tests.unit.packing.coloured_images import by_colour, picture, tar, write


def image_bytes(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (8, 8), shade).save(out, "PNG")
    return out.getvalue()


def folder_of(root: Path, paths: list[str]) -> Path:
    """Every file an image of its own shade."""
    for shade, name in enumerate(paths):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image_bytes(shade))
    return root


def tar_of(folder: Path, prefix: str = "") -> Path:
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.rglob("*"), reverse=True):  # any order: packing must not depend on it
            if file.is_file():
                tar.add(file, prefix + file.relative_to(folder).as_posix())
    return path


def contents(source: Source) -> dict[str, tuple[str, bytes]]:
    """key → (class, bytes)."""
    names = source.class_names or [""]
    return {key: (names[source.labels[i]], source.read(i)) for i, key in enumerate(source.keys)}


@pytest.mark.parametrize("prefix", ["", "./"])
@pytest.mark.parametrize("split", ["", "train/", "val/", "Imagenet/train/"])
def test_the_class_is_the_parent_folder(tmp_path: Path, split: str, prefix: str) -> None:
    folder = folder_of(tmp_path / "set", [f"{split}{name}" for name in ("dog/1.jpg", "cat/2.PNG", "cat/1.jpeg")])
    for place in (folder, tar_of(folder, prefix)):
        source = open_source(str(place))
        assert source.class_names == ["cat", "dog"]
        assert contents(source) == {
            f"{split}dog/1.jpg": ("dog", image_bytes(0)),
            f"{split}cat/2.PNG": ("cat", image_bytes(1)),
            f"{split}cat/1.jpeg": ("cat", image_bytes(2)),
        }
        assert {name: ids.tolist() for name, ids in source.splits.items()} == {"train": [0, 1, 2]}


def test_several_split_folders_become_splits(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set", ["train/dog/1.jpg", "train/cat/1.jpg", "val/cat/2.jpg"])
    source = open_source(str(folder))
    assert source.class_names == ["cat", "dog"]
    assert {name: [source.keys[i] for i in ids] for name, ids in source.splits.items()} == {
        "train": ["train/cat/1.jpg", "train/dog/1.jpg"],
        "val": ["val/cat/2.jpg"],
    }


def test_a_mapping_names_splits_and_matches_classes_by_name(tmp_path: Path) -> None:
    first = folder_of(tmp_path / "a", ["train/dog/1.jpg", "train/cat/1.jpg"])
    second = tar_of(folder_of(tmp_path / "b", ["test/dog/9.jpg"]))
    source = open_source({"train": str(first), "heldout": str(second)})
    assert source.class_names == ["cat", "dog"]
    assert [source.class_names[i] for i in source.labels] == ["cat", "dog", "dog"]
    assert {name: ids.tolist() for name, ids in source.splits.items()} == {"train": [0, 1], "heldout": [2]}
    assert source.read(2) == image_bytes(0)


def test_a_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    source = open_source(str(folder_of(tmp_path / "set", ["bus/1.jpg", "train/2.jpg", "truck/3.jpg"])))
    assert source.class_names == ["bus", "train", "truck"]


@pytest.mark.parametrize("folder", ["", "train/", "images/", "train/images/"])
def test_images_without_class_folders_have_no_classes(tmp_path: Path, folder: str) -> None:
    source = open_source(str(folder_of(tmp_path / "set", [f"{folder}1.jpg", f"{folder}2.jpg"])))
    assert source.class_names == []
    assert source.labels.tolist() == [0, 0]


def test_files_that_are_not_images_are_left_out(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set", ["a/1.jpg", "a/._1.jpg", "a/notes.txt", "__MACOSX/a/1.jpg", "b/.cache/2.jpg"])
    assert open_source(str(folder)).keys == ["a/1.jpg"]


def test_a_folder_without_images_says_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(UsageError, match="holds no images") as caught:
        open_source(str(tmp_path))
    assert "folder of images per class" in caught.value.remedy


def test_an_empty_folder_holds_no_images(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no images"):
        open_source(str(tmp_path))


def test_an_image_beside_class_folders_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"stray\.jpg has none"):
        open_source(str(folder_of(tmp_path, ["dog/1.jpg", "stray.jpg"])))


def test_a_named_split_with_splits_of_its_own_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set", ["train/dog/1.jpg", "val/cat/2.jpg"])
    with pytest.raises(UsageError, match="splits of its own: train, val"):
        open_source({"train": str(folder)})


def test_the_digits_are_split_at_random_with_a_fixed_seed() -> None:
    source, again = open_source("digits"), open_source("digits")
    assert source.class_names == list("0123456789")
    train, heldout = source.splits["train"], source.splits["heldout"]
    assert (len(train), len(heldout)) == (1437, 360)
    assert sorted([*train, *heldout]) == list(range(1797))
    counts = np.bincount(source.labels[heldout], minlength=10)
    assert (np.abs(counts - 36) < 4 * 36**0.5).all(), "every class, as often as chance has it (four deviations)"
    np.testing.assert_array_equal(heldout, again.splits["heldout"])
    pixels = np.asarray(Image.open(io.BytesIO(source.read(0))))
    assert pixels.shape == (8, 8)
    assert pixels.max() > 230


def test_every_layout_reads_the_same_from_a_bucket_and_from_disk(s3: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [picture(1), picture(2)], "label": [1, 0]}), tmp_path / "set.parquet")
    root = write(
        tmp_path / "root",
        {
            "tars/outer.tar": tar({f"{c}.tar": tar({f"{n}.png": picture(n)}) for n, c in enumerate("abc")}),
            "shards/set-000.tar": tar({"0.png": picture(1), "0.cls": b"1", "1.png": picture(2), "1.cls": b"0"}),
            "table/labels.csv": "path,label\n1.png,x\n2.png,y\n",
            "table/1.png": picture(1),
            "table/2.png": picture(2),
            "parquet/set.parquet": (tmp_path / "set.parquet").read_bytes(),
        },
    )
    bucket = s3.bucket()
    for name in files.list_files(str(root)):
        files.upload(root / name, files.join(bucket, name))
    for place in ("tars/outer.tar", "tars", "shards", "shards/set-000.tar", "table/labels.csv", "parquet"):
        local, remote = open_source(f"{root}/{place}"), open_source(files.join(bucket, place))
        assert by_colour(remote) == by_colour(local)
        assert (remote.keys, remote.class_names) == (local.keys, local.class_names)


def test_an_empty_file_in_a_tar_is_empty_in_a_bucket_too(s3: Any) -> None:
    url = files.join(s3.bucket(), "set.tar")
    files.write_bytes(url, tar({"a/1.png": picture(1), "a/2.png": b"", "a/3.png": b""}))
    source = open_source(url)
    assert [source.read(i) for i in range(3)] == [picture(1), b"", b""]


@pytest.mark.parametrize("name", ["x.tar", "x.csv", "x.txt#label", "x.parquet", "x.tar.gz"])
def test_a_folder_that_is_named_like_a_file_is_told_from_it(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path / name.partition("#")[0], ["cat/1.png", "dog/1.png"])
    with pytest.raises(UsageError, match=f"{folder} is a folder and not a file") as caught:
        open_source(f"{tmp_path}/{name}")
    assert f"{folder}/" in caught.value.remedy
    assert open_source(f"{folder}/").class_names == ["cat", "dog"]


def test_a_missing_tar_of_a_web_server_is_named(tmp_path: Path) -> None:
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/none.tar"
        with pytest.raises(UsageError) as caught:
            open_source(url)
        server.shutdown()
        thread.join()
    assert caught.value.message == f"{url} does not exist"
