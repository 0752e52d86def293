from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import webdataset

from pipeline.collection.manifest import Collection
from pipeline.collection.shard_file import read_shard
from pipeline.errors import CorruptError
from tests.unit.packing.coloured_images import DAMAGES, damaged_tar, tar


def test_samples_are_where_the_index_says(packed: Collection) -> None:
    found = [sample for shard in packed.shards for sample in read_shard(Path(packed.url, shard.name))]
    assert [sample.offset for sample in found] == packed.offset.tolist()
    assert [sample.length for sample in found] == packed.length.tolist()
    assert [sample.label for sample in found] == packed.labels.tolist()


def test_names_bytes_and_labels_are_those_that_webdataset_wrote(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with webdataset.TarWriter(str(path)) as sink:
        sink.write({"__key__": "a/1", "jpg": b"first", "cls": 7, "txt": "a caption"})
        sink.write({"__key__": "b.c/2", "png": b"second", "json": {"label": "cat"}})
        sink.write({"__key__": "3", "webp": b"third"})
    found = read_shard(path)
    assert [(sample.name, sample.label) for sample in found] == [("a/1.jpg", 7), ("b.c/2.png", "cat"), ("3.webp", None)]
    data = path.read_bytes()
    assert [data[sample.offset :][: sample.length] for sample in found] == [b"first", b"second", b"third"]


def test_a_dot_in_a_name_does_not_separate_an_image_from_its_label(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(
        tar({"v1.0.jpg": b"a", "v1.0.cls": b"3", "1.left.jpg": b"b", "1.cls": b"4", "2.jpg": b"c", "2.mask.png": b"d"})
    )
    assert [(sample.name, sample.label) for sample in read_shard(path)] == [
        ("v1.0.jpg", 3),
        ("1.left.jpg", 4),
        ("2.jpg", None),
    ]


@pytest.mark.parametrize("data", [b"no tar at all" * 100, b"\x1f\x8b" + b"x" * 1000])
def test_a_file_that_is_not_a_shard_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "0.tar").write_bytes(data)
    with pytest.raises(CorruptError, match=r"0\.tar is not a shard"):
        read_shard(tmp_path / "0.tar")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_shard_that_is_damaged_after_its_first_member_is_refused(tmp_path: Path, damage: str) -> None:
    (tmp_path / "0.tar").write_bytes(damaged_tar({"1.jpg": b"a", "1.cls": b"3", "2.jpg": b"b"}, damage))
    with pytest.raises(CorruptError, match=r"0\.tar is not a shard: .* at byte 2,048"):
        read_shard(tmp_path / "0.tar")


def test_a_shard_may_end_without_zeros(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(tar({"1.jpg": b"a", "2.jpg": b"b"})[:2048])
    assert [sample.name for sample in read_shard(tmp_path / "0.tar")] == ["1.jpg", "2.jpg"]


def test_links_are_no_members_of_a_sample(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        image = tarfile.TarInfo("1.jpg")
        image.size = 5
        tar.addfile(image, io.BytesIO(b"first"))
        for kind, name in ((tarfile.SYMTYPE, "1.cls"), (tarfile.LNKTYPE, "1.json"), (tarfile.SYMTYPE, "2.jpg")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
    assert [(sample.name, sample.label) for sample in read_shard(tmp_path / "0.tar")] == [("1.jpg", None)]


def test_a_label_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    """A sparse member says that it has 2 GB of zeros; a plain one has 2 MB."""
    sparse = tarfile.TarInfo("1.cls")
    sparse.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,0"}
    sparse.pax_headers |= {"GNU.sparse.name": "1.cls", "GNU.sparse.size": str(2 * 10**9)}
    with tarfile.open(tmp_path / "sparse.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(sparse)
    assert read_shard(tmp_path / "sparse.tar") == []
    plain = tarfile.TarInfo("1.cls")
    plain.size = 2 * 10**6
    with tarfile.open(tmp_path / "plain.tar", "w") as tar:
        tar.addfile(plain, io.BytesIO(bytes(plain.size)))
    with pytest.raises(CorruptError, match=r"1\.cls"):
        read_shard(tmp_path / "plain.tar")


def test_headers_that_exhaust_the_reader_are_refused(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 0
    (tmp_path / "0.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) * 20_000)
    with pytest.raises(CorruptError, match=r"0\.tar is not a shard"):
        read_shard(tmp_path / "0.tar")
