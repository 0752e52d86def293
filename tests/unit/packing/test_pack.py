from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.collection.manifest import Collection
from pipeline.config.schema import PackSection
from pipeline.errors import CorruptError, UsageError
from pipeline.packing.pack import pack
from pipeline.storage import files
from tests.unit.conftest import quiet
from tests.unit.packing.coloured_images import picture, tar, write
from tests.unit.packing.read_collection import bytes_of, read_back


def interrupt(done: int, total: int | None) -> None:
    """A progress report that ends the packing."""
    raise KeyboardInterrupt


def interrupt_halfway(done: int, total: int | None) -> None:
    assert total is not None
    if done > total // 2:
        raise KeyboardInterrupt


def test_webdataset_reads_every_image_with_its_label(packed: Collection, class_of: Callable[..., str]) -> None:
    samples = read_back(packed, "train")
    assert len({sample["__key__"] for sample in samples}) == len(samples) == 60
    for sample in samples:
        assert packed.class_names[sample["cls"]] == class_of(sample["png"])
    assert np.bincount([sample["cls"] for sample in samples]).tolist() == [30, 20, 10]


def test_samples_are_permuted_by_the_seed(packed: Collection, images: Path, tmp_path: Path) -> None:
    other = pack(f"{tmp_path}/other", PackSection(source=str(images), resolution=32, shard_images=7, seed=1))
    assert len(np.unique(packed.labels[:7])) > 1
    assert (packed.labels != other.labels).any()


def test_packing_twice_gives_the_same_bytes_from_folder_and_tar(
    packed: Collection, images: Path, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(images, "somewhere/train")
    section = PackSection(source=f"{tmp_path}/images.tar", resolution=32, shard_images=7)
    again = pack(f"{tmp_path}/again", section)
    assert bytes_of(again.url) == bytes_of(packed.url)
    assert again.digest == packed.digest


def test_shards_carry_no_trace_of_time_or_user(packed: Collection) -> None:
    with tarfile.open(f"{packed.url}/{packed.shards[0].name}") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "sagan", "sagan", 0o444)}


def test_the_same_section_is_not_packed_again(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = PackSection(source=str(images), resolution=32)
    first = pack(f"{tmp_path}/set", section)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    assert pack(f"{tmp_path}/set", section.model_copy(update={"max_broken": 5})).digest == first.digest
    assert "is packed already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()} == written


@pytest.mark.parametrize("change", [{"resolution": 64}, {"encoding": "jpeg"}, {"seed": 1}, {"source": "digits"}])
def test_another_section_does_not_overwrite(images: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    section = PackSection(source=str(images), resolution=32)
    pack(f"{tmp_path}/set", section)
    before = bytes_of(tmp_path / "set")
    with pytest.raises(UsageError, match=f"packed with other options: .*{next(iter(change))}"):
        pack(f"{tmp_path}/set", section.model_copy(update=change))
    assert bytes_of(tmp_path / "set") == before


@pytest.mark.parametrize("data", [b"", b"[]", b"[" * 100_000, b"\xff"])
def test_a_record_of_other_people_that_is_no_object_is_named(data: bytes, images: Path, tmp_path: Path) -> None:
    section = PackSection(source=str(images), resolution=32)
    pack(str(tmp_path), section, quiet)
    (tmp_path / "pack.json").write_bytes(data)
    with pytest.raises(CorruptError, match=r"pack\.json"):
        pack(str(tmp_path), section, quiet)


def test_an_interrupted_packing_leaves_no_collection_and_can_be_repeated(images: Path, tmp_path: Path) -> None:
    section = PackSection(source=str(images), resolution=32, shard_images=7)
    with pytest.raises(KeyboardInterrupt):
        pack(f"{tmp_path}/set", section, interrupt_halfway)
    assert list((tmp_path / "set").iterdir()), "some shards were written"
    with pytest.raises(UsageError, match="holds no packed collection"):
        Collection.open(f"{tmp_path}/set")
    assert pack(f"{tmp_path}/set", section).size("train") == 60


def test_whole_shards_of_an_interrupted_packing_are_kept(packed: Collection, images: Path, tmp_path: Path) -> None:
    """A shard that was damaged meanwhile is packed again; the end is what an uninterrupted packing writes."""
    section, folder = PackSection(source=str(images), resolution=32, shard_images=7), tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        pack(str(folder), section, interrupt_halfway)
    whole = {path: path.stat().st_mtime_ns for path in folder.glob("train-*.tar")}
    damaged = folder / "train-00001.tar"
    data = bytearray(damaged.read_bytes())
    data[3000] ^= 1
    damaged.write_bytes(data)
    assert pack(str(folder), section).digest == packed.digest
    assert bytes_of(folder) == bytes_of(packed.url)
    del whole[damaged]
    assert len(whole) >= 3
    assert {path: path.stat().st_mtime_ns for path in whole} == whole
    assert not (folder / ".packing").exists()


@pytest.mark.parametrize(
    "change", [{"broken": {"999": "x"}}, {"broken": [1]}, {"size": -1}, {"sha256": "x"}, {"inputs": None}]
)
def test_a_receipt_that_means_nothing_counts_as_none(
    packed: Collection, images: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    section = PackSection(source=str(images), resolution=32, shard_images=7)
    with pytest.raises(KeyboardInterrupt):
        pack(str(tmp_path), section, interrupt_halfway)
    for number, path in enumerate(sorted((tmp_path / ".packing").iterdir())):
        path.write_text(json.dumps(json.loads(path.read_text()) | change if number else []))
    assert pack(str(tmp_path), section, quiet).digest == packed.digest


def test_a_shard_with_other_images_is_packed_again(images: Path, tmp_path: Path) -> None:
    section = PackSection(source=str(images), resolution=32, shard_images=20)
    for other in ({"seed": 1}, {"encoding": "jpeg"}, {"source": f"{images}/bee", "shard_images": 7}):
        with pytest.raises(KeyboardInterrupt):
            pack(f"{tmp_path}/set", section.model_copy(update=other), interrupt)
    expected = pack(f"{tmp_path}/expected", section)
    assert pack(f"{tmp_path}/set", section).digest == expected.digest


class TestDestinationAndSource:
    """A packing that is repeated would list shards in its source as images of the source."""

    @pytest.mark.parametrize("split", ["", "heldout"])
    @pytest.mark.parametrize("destination", ["set", "set/", "set/packed", "other/../set/ant/packed", "link/packed"])
    def test_a_destination_in_the_source_is_refused(self, tmp_path: Path, destination: str, split: str) -> None:
        root = write(tmp_path / "set", {"ant/1.png": picture(1), "bee/2.png": picture(2)})
        (tmp_path / "link").symlink_to("set")
        source = {"train": f"{tmp_path}/elsewhere", split: str(root)} if split else str(root)
        with pytest.raises(UsageError, match=f"{destination} would lie in the source {root}"):
            pack(f"{tmp_path}/{destination}", PackSection(source=source, resolution=32))
        assert files.list_files(str(root)) == ["ant/1.png", "bee/2.png"]

    def test_a_destination_in_the_source_is_refused_in_a_bucket(self) -> None:
        bucket = "memory://destination"
        files.write_bytes(f"{bucket}/set/ant/1.png", picture(1))
        for destination in ("set", "set/packed"):
            with pytest.raises(UsageError, match=f"{bucket}/{destination} would lie in the source {bucket}/set/"):
                pack(f"{bucket}/{destination}", PackSection(source=f"{bucket}/set/", resolution=32))
        assert files.list_files(bucket) == ["set/ant/1.png"]
        assert pack(f"{bucket}/set-packed", PackSection(source=f"{bucket}/set", resolution=32)).size("train") == 1

    @pytest.mark.parametrize("destination", ["set-packed", "."])
    def test_a_destination_beside_or_above_the_source_is_packed(self, tmp_path: Path, destination: str) -> None:
        root = write(tmp_path / "set", {"ant/1.png": picture(1), "bee/2.png": picture(2)})
        collection = pack(f"{tmp_path}/{destination}", PackSection(source=str(root), resolution=32))
        assert collection.class_names == ["ant", "bee"]

    @pytest.mark.parametrize("below", ["", "/set", "/deep/set"])
    def test_a_destination_that_is_a_file_is_refused(self, images: Path, tmp_path: Path, below: str) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UsageError, match=f"{tmp_path}/file is a file and not a folder"):
            pack(f"{tmp_path}/file{below}", PackSection(source=str(images), resolution=32))

    def test_a_tar_that_a_shard_would_overwrite_is_kept(self, tmp_path: Path) -> None:
        source = tmp_path / "train-00000.tar"
        source.write_bytes(data := tar({"ant/1.png": picture(1), "bee/2.png": picture(2)}))
        with pytest.raises(UsageError, match="a shard could overwrite the source"):
            pack(str(tmp_path), PackSection(source=str(source), resolution=32))
        assert source.read_bytes() == data


class TestExclude:
    def test_an_excluded_image_changes_only_its_own_shard(
        self, packed: Collection, images: Path, tmp_path: Path
    ) -> None:
        names = Path(packed.url, "keys.txt").read_text().splitlines()
        (tmp_path / "bad.txt").write_text(f"{names[10]}\n")
        section = PackSection(source=str(images), resolution=32, shard_images=7, exclude=f"{tmp_path}/bad.txt")
        collection = pack(f"{tmp_path}/set", section)
        assert Path(collection.url, "keys.txt").read_text().splitlines() == names[:10] + names[11:]
        assert [shard.sha256 for i, shard in enumerate(collection.shards) if i != 1] == [
            shard.sha256 for i, shard in enumerate(packed.shards) if i != 1
        ]
        assert collection.shards[1].count == 6
        with pytest.raises(UsageError, match="packed with other options: exclude"):
            pack(collection.url, section.model_copy(update={"exclude": None}))

    def test_a_name_that_no_image_has_is_an_error(self, images: Path, tmp_path: Path) -> None:
        (tmp_path / "bad.txt").write_text("ant/none.png\n")
        section = PackSection(source=str(images), resolution=32, exclude=f"{tmp_path}/bad.txt")
        with pytest.raises(UsageError, match=r"1 image to leave out cannot be found in the source: ant/none\.png"):
            pack(f"{tmp_path}/set", section)
        with pytest.raises(UsageError, match=r"gone\.txt does not exist"):
            pack(f"{tmp_path}/set", section.model_copy(update={"exclude": f"{tmp_path}/gone.txt"}))

    def test_a_file_that_holds_no_names_is_refused(self, images: Path, tmp_path: Path) -> None:
        (tmp_path / "bad.txt").write_bytes(b"ant/00.png\nant/caf\xe9.png\n")
        for exclude, reason in {"bad.txt": "line 2 is not UTF-8", "": "is a folder and not a file"}.items():
            section = PackSection(source=str(images), resolution=32, exclude=f"{tmp_path}/{exclude}")
            with pytest.raises(UsageError, match=f"{tmp_path}.*{reason}"):
                pack(f"{tmp_path}/set", section)


class TestBroken:
    @pytest.fixture
    def source(self, tmp_path: Path) -> str:
        folder = tmp_path / "source" / "ant"
        folder.mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (40, 40), (i, i, i)).save(folder / f"{i}.png")
        (folder / "text.jpg").write_text("not an image")
        (folder / "empty.png").write_bytes(b"")
        return str(folder.parent)

    def test_broken_images_are_listed_with_their_reasons(self, source: str, tmp_path: Path) -> None:
        with pytest.raises(UsageError) as caught:
            pack(f"{tmp_path}/set", PackSection(source=source, resolution=32))
        assert "2 images cannot be used; max_broken allows 0" in caught.value.message
        assert "ant/text.jpg: not an image" in caught.value.message
        assert "ant/empty.png: the file is empty" in caught.value.message
        assert "max_broken=2" in caught.value.remedy
        assert not (tmp_path / "set" / "manifest.json").exists()

    def test_tolerated_images_are_left_out_and_listed(
        self, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        collection = pack(f"{tmp_path}/set", PackSection(source=source, resolution=32, max_broken=2))
        assert collection.size("train") == 4
        assert "left out: ant/text.jpg" in capsys.readouterr().out

    def test_a_source_of_only_broken_images_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "text.jpg").write_text("not an image")
        with pytest.raises(UsageError, match="none of the 1 images can be used"):
            pack(f"{tmp_path}/set", PackSection(source=f"{tmp_path}/source", resolution=32, max_broken=9))


def test_images_without_classes_have_no_labels(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 40), (i, i, i)).save(tmp_path / "source" / f"{i}.png")
    collection = pack(f"{tmp_path}/set", PackSection(source=f"{tmp_path}/source", resolution=32))
    assert (collection.class_names, collection.num_classes, collection.labels.tolist()) == ([], 0, [0, 0, 0])
    assert all("cls" not in sample for sample in read_back(collection, "train"))


def test_a_single_class_does_not_count_as_a_class(tmp_path: Path) -> None:
    (tmp_path / "source" / "ant").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "source" / "ant" / "1.png")
    collection = pack(f"{tmp_path}/set", PackSection(source=f"{tmp_path}/source", resolution=32))
    assert (collection.class_names, collection.num_classes) == (["ant"], 0)


def test_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    collection = pack(f"{tmp_path}/digits", PackSection(source="digits", resolution=32))
    assert (collection.size("train"), collection.size("heldout"), collection.encoding) == (1437, 360, "png")
    assert collection.num_classes == 10
    samples = read_back(collection, "heldout")
    assert [sample["cls"] for sample in samples] == collection.labels[list(collection.splits["heldout"])].tolist()
    assert all(sample["png"].shape == (32, 32, 3) for sample in samples)
    out = capsys.readouterr().out
    assert "train: 1,437 images" in out
    assert f"next: sagan run jobs/cifar10.yaml data.train={tmp_path}/digits data.augment=diffaugment\n" in out


def test_names_of_files_that_are_left_out_do_not_control_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set" / "ant").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "set" / "ant" / "0.png")
    (tmp_path / "set" / "ant" / "x.\x1b[2J").write_text("")
    pack(str(tmp_path / "packed"), PackSection(source=str(tmp_path / "set"), resolution=32))
    printed = capsys.readouterr().out
    assert r"x.\x1b[2J" in printed
    assert "\x1b" not in printed
