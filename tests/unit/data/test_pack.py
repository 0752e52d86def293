from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.config.schema import PackSection
from pipeline.data.index import Collection, read_shard
from pipeline.data.pack import pack
from pipeline.data.verify import verify
from pipeline.errors import CorruptError, UsageError


def read_back(collection: Collection, split: str) -> list[dict[str, Any]]:
    """The samples of a split, as the webdataset package reads them."""
    urls = [f"{collection.url}/{shard.name}" for shard in collection.shards if shard.split == split]
    return list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))


def bytes_of(folder: str | Path) -> dict[str, bytes]:
    """Everything but what names the source."""
    named = {"pack.json", "keys.txt", "preview.png"}
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name not in named}


def test_webdataset_reads_every_image_with_its_label(packed: Collection, class_of: Callable[..., str]) -> None:
    samples = read_back(packed, "train")
    assert len({sample["__key__"] for sample in samples}) == len(samples) == 60
    for sample in samples:
        assert packed.class_names[sample["cls"]] == class_of(sample["png"])
    assert np.bincount([sample["cls"] for sample in samples]).tolist() == [30, 20, 10]


def test_the_index_says_where_the_bytes_of_every_image_are(packed: Collection, class_of: Callable[..., str]) -> None:
    for i, (number, offset, length) in enumerate(zip(packed.shard, packed.offset, packed.length, strict=True)):
        data = Path(packed.url, packed.shards[number].name).read_bytes()[offset : offset + length]
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        assert packed.class_names[packed.labels[i]] == class_of(pixels)


def test_what_the_collection_says_of_itself(packed: Collection) -> None:
    assert (packed.resolution, packed.encoding, packed.classes) == (32, "png", 3)
    assert packed.class_names == ["ant", "bee", "cow"]
    assert packed.splits == {"train": range(60)}
    assert packed.shard_sizes("train") == [7] * 8 + [4]
    with pytest.raises(UsageError, match="no split 'test'") as caught:
        packed.size("test")
    assert "train" in caught.value.remedy


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
    assert "packed already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()} == written


@pytest.mark.parametrize("change", [{"resolution": 64}, {"encoding": "jpeg"}, {"seed": 1}, {"source": "digits"}])
def test_another_section_does_not_overwrite(images: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    section = PackSection(source=str(images), resolution=32)
    pack(f"{tmp_path}/set", section)
    before = bytes_of(tmp_path / "set")
    with pytest.raises(UsageError, match=f"packed otherwise: .*{next(iter(change))}"):
        pack(f"{tmp_path}/set", section.model_copy(update=change))
    assert bytes_of(tmp_path / "set") == before


def test_an_interrupted_packing_leaves_no_collection_and_can_be_repeated(images: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    section = PackSection(source=str(images), resolution=32, shard_images=7)
    with pytest.raises(KeyboardInterrupt):
        pack(f"{tmp_path}/set", section, interrupt)
    assert list((tmp_path / "set").iterdir()), "some shards were written"
    with pytest.raises(UsageError, match="holds no packed collection"):
        Collection.open(f"{tmp_path}/set")
    assert pack(f"{tmp_path}/set", section).size("train") == 60


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

    def test_all_are_listed_with_their_reasons(self, source: str, tmp_path: Path) -> None:
        with pytest.raises(UsageError) as caught:
            pack(f"{tmp_path}/set", PackSection(source=source, resolution=32))
        assert "2 images cannot be decoded, 0 are tolerated" in caught.value.message
        assert "ant/text.jpg: not an image" in caught.value.message
        assert "ant/empty.png: the file is empty" in caught.value.message
        assert "max_broken=2" in caught.value.remedy
        assert not (tmp_path / "set" / "manifest.json").exists()

    def test_tolerated_ones_are_left_out_and_listed(
        self, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        collection = pack(f"{tmp_path}/set", PackSection(source=source, resolution=32, max_broken=2))
        assert collection.size("train") == 4
        assert "left out: ant/text.jpg" in capsys.readouterr().out

    def test_nothing_but_broken_ones_is_an_error_whatever_is_tolerated(self, tmp_path: Path) -> None:
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "text.jpg").write_text("not an image")
        with pytest.raises(UsageError, match="not one of 1 images could be decoded"):
            pack(f"{tmp_path}/set", PackSection(source=f"{tmp_path}/source", resolution=32, max_broken=9))


def test_images_without_classes_have_no_labels(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 40), (i, i, i)).save(tmp_path / "source" / f"{i}.png")
    collection = pack(f"{tmp_path}/set", PackSection(source=f"{tmp_path}/source", resolution=32))
    assert (collection.class_names, collection.classes, collection.labels.tolist()) == ([], 0, [0, 0, 0])
    assert all("cls" not in sample for sample in read_back(collection, "train"))


def test_one_class_is_no_condition(tmp_path: Path) -> None:
    (tmp_path / "source" / "ant").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "source" / "ant" / "1.png")
    collection = pack(f"{tmp_path}/set", PackSection(source=f"{tmp_path}/source", resolution=32))
    assert (collection.class_names, collection.classes) == (["ant"], 0)


def test_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    collection = pack(f"{tmp_path}/digits", PackSection(source="digits", resolution=32))
    assert (collection.size("train"), collection.size("heldout"), collection.encoding) == (1437, 360, "png")
    assert collection.classes == 10
    samples = read_back(collection, "heldout")
    assert [sample["cls"] for sample in samples] == collection.labels[list(collection.splits["heldout"])].tolist()
    assert all(sample["png"].shape == (32, 32, 3) for sample in samples)
    out = capsys.readouterr().out
    assert "train: 1,437 images" in out
    assert f"next: sagan run jobs/cifar10.yaml data.train={tmp_path}/digits" in out


class TestVerify:
    def test_a_whole_collection_passes(self, packed: Collection) -> None:
        seen: list[tuple[int, int]] = []
        assert verify(packed.url, lambda done, total: seen.append((done, total))).digest == packed.digest
        assert seen[-1] == (60, 60)

    def test_a_flipped_byte_is_found_with_shard_and_key(self, packed: Collection, copied: Path) -> None:
        """In the middle of an image: its checksum fails, and so does the shard's."""
        name = packed.shards[3].name
        sample = list(read_shard(copied / name))[2]
        data = bytearray((copied / name).read_bytes())
        data[sample.offset + sample.length // 2] ^= 1
        (copied / name).write_bytes(data)
        with pytest.raises(CorruptError) as caught:
            verify(str(copied))
        assert f"{name}: its SHA-256 is not the manifest's" in caught.value.message
        assert f"{name}: {sample.name}: " in caught.value.message
        assert packed.shards[2].name not in caught.value.message

    def test_missing_and_truncated_shards_are_all_named(self, packed: Collection, copied: Path) -> None:
        (copied / packed.shards[0].name).unlink()
        truncated = copied / packed.shards[1].name
        truncated.write_bytes(truncated.read_bytes()[:5000])
        with pytest.raises(CorruptError) as caught:
            verify(str(copied))
        assert f"{packed.shards[0].name}: missing" in caught.value.message
        assert packed.shards[1].name in caught.value.message

    def test_an_index_that_was_changed_is_refused(self, copied: Path) -> None:
        data = bytearray((copied / "index.safetensors").read_bytes())
        data[-1] ^= 1
        (copied / "index.safetensors").write_bytes(data)
        with pytest.raises(CorruptError, match=r"index\.safetensors differs"):
            Collection.open(str(copied))

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}'])
    def test_a_manifest_that_is_none_is_refused(self, copied: Path, text: str) -> None:
        (copied / "manifest.json").write_text(text)
        with pytest.raises(CorruptError, match=r"manifest\.json is not"):
            Collection.open(str(copied))

    def test_a_manifest_of_another_format_is_refused(self, copied: Path) -> None:
        manifest = json.loads((copied / "manifest.json").read_text())
        (copied / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
        with pytest.raises(UsageError, match="format 2"):
            Collection.open(str(copied))


@pytest.mark.parametrize(
    ("archive", "resolution", "per_class"),
    [("cifar10-train-5000.tar", 32, [500] * 10), ("imagenette128-train-1500.tar", 128, [150] * 10)],
)
def test_real_collections(
    test_data: Path | None, tmp_path: Path, archive: str, resolution: int, per_class: list[int]
) -> None:
    """From the tar and unpacked: the same bytes, every pixel and every label right, read by webdataset."""
    if test_data is None:
        pytest.skip("SAGAN_TEST_DATA names no folder with real collections")
    with tarfile.open(test_data / archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    index = test_data / "imagenet_class_index.json"
    (tmp_path / index.name).write_bytes(index.read_bytes())  # beside the folder, as it stands beside the tar
    name_of = dict(json.loads(index.read_text()).values())
    section = PackSection(source=str(test_data / archive), resolution=resolution, encoding="png")
    collection = pack(f"{tmp_path}/packed", section)
    unpacked = pack(f"{tmp_path}/again", section.model_copy(update={"source": f"{tmp_path}/unpacked"}))
    assert bytes_of(unpacked.url) == bytes_of(collection.url)

    originals = (tmp_path / "unpacked").rglob("*.*")
    class_of = {
        np.asarray(Image.open(path).convert("RGB")).tobytes(): name_of.get(path.parent.name, path.parent.name)
        for path in originals
    }
    samples = read_back(collection, "train")
    assert len(samples) == sum(per_class)
    for sample in samples:
        assert collection.class_names[sample["cls"]] == class_of[sample["png"].tobytes()].replace("_", " ")
    assert np.bincount(collection.labels).tolist() == per_class


def test_originals_of_every_size_and_shape(test_data: Path | None, tmp_path: Path) -> None:
    if test_data is None:
        pytest.skip("SAGAN_TEST_DATA names no folder with real collections")
    collection = pack(f"{tmp_path}/set", PackSection(source=f"{test_data}/imagenet-originals-30.tar", resolution=64))
    assert len(collection.class_names) == collection.size("train") == 30
    assert all(sample["jpg"].shape == (64, 64, 3) for sample in read_back(collection, "train"))
    verify(collection.url)
