from __future__ import annotations

import io
import json
import shlex
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config.load import load
from pipeline.config.schema import DataSection, PackSection, TrainJob
from pipeline.data.commit import next_command
from pipeline.data.index import Collection, read_shard
from pipeline.data.pack import pack
from pipeline.data.stream import Stream
from pipeline.data.verify import verify
from pipeline.errors import CorruptError, UsageError
from sagan.world import World


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


def test_what_an_interrupted_packing_left_whole_is_kept(packed: Collection, images: Path, tmp_path: Path) -> None:
    """A shard that was damaged meanwhile is packed again; the end is what an uninterrupted packing writes."""

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    section, folder = PackSection(source=str(images), resolution=32, shard_images=7), tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        pack(str(folder), section, interrupt)
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


def test_other_images_of_the_same_shard_are_not_taken_for_those(images: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    section = PackSection(source=str(images), resolution=32, shard_images=20)
    for other in ({"seed": 1}, {"encoding": "jpeg"}, {"source": f"{images}/bee", "shard_images": 7}):
        with pytest.raises(KeyboardInterrupt):
            pack(f"{tmp_path}/set", section.model_copy(update=other), interrupt)
    expected = pack(f"{tmp_path}/expected", section)
    assert pack(f"{tmp_path}/set", section).digest == expected.digest


class TestExclude:
    def test_one_image_less_changes_its_own_shard_alone(self, packed: Collection, images: Path, tmp_path: Path) -> None:
        names = Path(packed.url, "keys.txt").read_text().splitlines()
        (tmp_path / "bad.txt").write_text(f"{names[10]}\n")
        section = PackSection(source=str(images), resolution=32, shard_images=7, exclude=f"{tmp_path}/bad.txt")
        collection = pack(f"{tmp_path}/set", section)
        assert Path(collection.url, "keys.txt").read_text().splitlines() == names[:10] + names[11:]
        assert [shard.sha256 for i, shard in enumerate(collection.shards) if i != 1] == [
            shard.sha256 for i, shard in enumerate(packed.shards) if i != 1
        ]
        assert collection.shards[1].count == 6
        with pytest.raises(UsageError, match="packed otherwise: exclude"):
            pack(collection.url, section.model_copy(update={"exclude": None}))

    def test_a_name_that_no_image_has_is_an_error(self, images: Path, tmp_path: Path) -> None:
        (tmp_path / "bad.txt").write_text("ant/none.png\n")
        section = PackSection(source=str(images), resolution=32, exclude=f"{tmp_path}/bad.txt")
        with pytest.raises(UsageError, match=r"1 image to leave out cannot be found in the source: ant/none\.png"):
            pack(f"{tmp_path}/set", section)
        with pytest.raises(UsageError, match=r"gone\.txt does not exist"):
            pack(f"{tmp_path}/set", section.model_copy(update={"exclude": f"{tmp_path}/gone.txt"}))

    def test_what_verify_prints_is_what_it_takes(
        self, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Shards of others with an image that cannot be decoded: indexed, found by verify, and indexed without it."""
        shards = tmp_path / "shards"
        shards.mkdir()
        with webdataset.TarWriter(f"{shards}/train-000.tar") as sink:
            for n, path in enumerate(sorted(images.rglob("*.png"))):
                data = path.read_bytes()
                sink.write({"__key__": f"{n:03d}", "png": data[:-900] if n in (4, 44) else data, "cls": n % 2})
        section = PackSection(source=str(shards), index_only=True)
        collection = pack(str(shards), section)
        capsys.readouterr()
        with pytest.raises(CorruptError, match=r"train-000\.tar: 044\.png: cannot be decoded"):
            verify(collection.url)
        printed = capsys.readouterr().out
        assert printed == "train-000/004.png\ntrain-000/044.png\n"
        (tmp_path / "bad.txt").write_text(printed)
        (shards / "manifest.json").unlink()
        assert pack(str(shards), section.model_copy(update={"exclude": f"{tmp_path}/bad.txt"})).size("train") == 58
        verify(str(shards))
        repacked = pack(
            f"{tmp_path}/set", PackSection(source=str(shards), resolution=32, exclude=f"{tmp_path}/bad.txt")
        )
        assert repacked.size("train") == 58


class TestIndexOnly:
    @pytest.fixture
    def shards(self, images: Path, tmp_path: Path) -> Path:
        folder = tmp_path / "shards"
        folder.mkdir()
        paths = sorted(images.rglob("*.png"))
        for name, part in {
            "set-val-0.tar": paths[:20],
            "set-train-0.tar": paths[20:35],
            "set-train-1.tar": paths[35:],
        }.items():
            with webdataset.TarWriter(f"{folder}/{name}") as sink:
                for path in part:
                    key = f"./{path.parent.name}.d/{path.stem}"
                    sink.write({"__key__": key, "png": path.read_bytes(), "cls": path.parent.name})
        return folder

    def test_shards_of_others_become_a_collection_as_they_are(
        self, shards: Path, class_of: Callable[..., str], images: Path
    ) -> None:
        before = {path.name: path.read_bytes() for path in shards.iterdir()}
        collection = pack(str(shards), PackSection(source=str(shards), index_only=True))
        assert {name: (shards / name).read_bytes() for name in before} == before
        assert {split: len(ids) for split, ids in collection.splits.items()} == {"train": 40, "val": 20}
        assert (collection.resolution, collection.encoding) == (32, "png")
        assert collection.class_names == ["ant", "bee", "cow"]
        seen = set()
        for i, label in enumerate(collection.labels):
            start = int(collection.offset[i])
            data = (shards / collection.shards[collection.shard[i]].name).read_bytes()
            pixels = np.asarray(Image.open(io.BytesIO(data[start : start + collection.length[i]])))
            assert class_of(pixels) == collection.class_names[label]
            seen.add(pixels.tobytes())
        assert len(seen) == 60
        verify(collection.url)

    def test_from_the_command_line_by_a_relative_path(self, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(shards.parent)
        assert CliRunner().invoke(app, ["pack", "shards/", "--index-only"], catch_exceptions=False).exit_code == 0
        assert Collection.open(str(shards)).size("train") == 40

    def test_images_of_another_size_are_broken(self, shards: Path) -> None:
        with webdataset.TarWriter(f"{shards}/set-train-2.tar") as sink:
            sink.write({"__key__": "odd", "png": png(40, 30), "cls": "ant"})
        with pytest.raises(UsageError, match=r"set-train-2/odd\.png: 40 x 30 pixels, not 32 x 32"):
            pack(str(shards), PackSection(source=str(shards), index_only=True))

    def test_what_cannot_be_indexed_in_place_is_to_be_packed(self, images: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no WebDataset shards") as caught:
            pack(str(images), PackSection(source=str(images), index_only=True))
        assert "pack them instead" in caught.value.remedy
        (tmp_path / "shards").mkdir()
        with webdataset.TarWriter(f"{tmp_path}/shards/0.tar") as sink:
            sink.write({"__key__": "0", "png": png(500, 500), "cls": 0})
        with pytest.raises(UsageError, match="500 pixels wide"):
            pack(f"{tmp_path}/shards", PackSection(source=f"{tmp_path}/shards", index_only=True))


def png(width: int, height: int, shade: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (shade, shade, 0)).save(out, "PNG")
    return out.getvalue()


class TestWarnings:
    @staticmethod
    def warnings(folder: Path, contents: dict[str, bytes], capsys: pytest.CaptureFixture[str]) -> str:
        for name, data in contents.items():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes(data)
        pack(f"{folder}/set", PackSection(source=f"{folder}/source", resolution=32, max_broken=1))
        return capsys.readouterr().out

    def test_none_where_nothing_is_odd(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = self.warnings(
            tmp_path,
            {f"{name}/{n}.png": png(9, 9, n + 99 * k) for n in range(3) for k, name in enumerate("ab")},
            capsys,
        )
        assert "warning" not in out
        assert "note" not in out

    def test_duplicates_within_and_across_splits(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        contents = {
            "train/a/1.png": png(9, 9),
            "train/a/2.png": png(20, 9),
            "val/b/3.png": png(9, 9),
            "train/b/4.png": png(9, 9, 5),
        }
        out = self.warnings(tmp_path, contents, capsys)
        assert "2 images had been there before, the same to the byte" in out
        assert "1 of them stand in two splits" in out
        assert "1 of them have another label there" in out

    def test_uneven_classes(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = self.warnings(
            tmp_path, {f"a/{n}.png": png(9, 9, n) for n in range(40)} | {"b/0.png": png(9, 9, 99)}, capsys
        )
        assert "'a' has 40 images, 'b' only 1" in out

    def test_classes_without_images(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Never there, of a kind that is not read, or broken."""
        (tmp_path / "source" / "empty").mkdir(parents=True)
        contents = {"a/0.png": png(9, 9), "b/0.png": png(9, 9, 1), "phone/0.heic": b"x", "broken/0.png": b"x"}
        out = self.warnings(tmp_path, contents, capsys)
        assert "folders without any image are no classes: empty, phone" in out
        assert "1 .heic files are of a kind that is not read" in out
        assert "train: 1 classes have no images: broken" in out

    def test_labels_that_are_all_equal(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        contents = {"train/a/0.png": png(9, 9), "train/a/1.png": png(9, 9, 1), "val/b/0.png": png(9, 9, 2)}
        assert "train: all images have the same label, 'a'" in self.warnings(tmp_path, contents, capsys)

    def test_one_class(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "there is one class, 'a'" in self.warnings(tmp_path, {"a/0.png": png(9, 9)}, capsys)


def test_the_preview_has_a_row_for_each_class_with_its_images(packed: Collection) -> None:
    picture = np.asarray(Image.open(f"{packed.url}/preview.png"))
    left = _first_tile_column(picture)
    first_tiles = {picture[top : top + 64, left : left + 64].tobytes() for top in range(len(picture) - 64)}
    for label in range(3):
        i = int(np.flatnonzero(packed.labels == label)[0])
        data = Path(packed.url, packed.shards[packed.shard[i]].name).read_bytes()[packed.offset[i] :][
            : packed.length[i]
        ]
        tile = Image.open(io.BytesIO(data)).resize((64, 64), Image.Resampling.NEAREST)
        assert np.asarray(tile).tobytes() in first_tiles


def _first_tile_column(picture: np.ndarray) -> int:
    """Where the first column of tiles begins: the first column of pixels that is coloured."""
    coloured = (picture.max(axis=2).astype(int) - picture.min(axis=2)).max(axis=0) > 50
    return int(np.flatnonzero(coloured)[0])


@pytest.mark.parametrize("resolution", [32, 64, 128, 256])
@pytest.mark.parametrize("classes", [0, 2, 200, 1000])
def test_the_next_command_names_a_job_that_fits(packed: Collection, resolution: int, classes: int) -> None:
    names = [str(i) for i in range(classes)]
    found = next_command(replace(packed, resolution=resolution, class_names=names, url="s3://bucket/my set"))
    sagan, run, path, override = shlex.split(found)
    assert (sagan, run, override) == ("sagan", "run", "data.train=s3://bucket/my set")
    job = load(Path(__file__).parents[3] / path)
    assert isinstance(job, TrainJob)
    assert job.model.resolution == resolution
    assert job.model.classes in (None, classes)


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
    [
        ("cifar10-train-5000.tar", 32, [500] * 10),
        ("imagenette128-val-250.tar", 128, [25] * 10),
        pytest.param("imagenette128-train-1500.tar", 128, [150] * 10, marks=pytest.mark.slow),
    ],
)
def test_real_collections(
    test_data: Path | None, tmp_path: Path, archive: str, resolution: int, per_class: list[int]
) -> None:
    """From the tar and unpacked: the same bytes, every pixel and every label right, read by webdataset."""
    if test_data is None:
        pytest.skip("SAGAN_TEST_DATA names no folder with real collections")
    with tarfile.open(test_data / archive) as tar:
        tar.extractall(tmp_path / "unpacked")
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


@pytest.mark.parametrize(
    ("archive", "resolution", "images", "classes"),
    [
        ("imagenet-originals-30.tar", 128, 30, 30),
        ("trashnet-24.tar", 256, 24, 6),
        ("imagenette128-val-250.tar", 64, 250, 10),
        pytest.param("cifar10-test-1017.tar", 32, 1017, 10, marks=pytest.mark.slow),
        pytest.param("cifar10-train-5000.tar", 32, 5000, 10, marks=pytest.mark.slow),
        pytest.param("imagenette128-train-1500.tar", 128, 1500, 10, marks=pytest.mark.slow),
    ],
)
def test_real_collections_are_verified_previewed_and_streamed(
    test_data: Path | None,
    tmp_path: Path,
    archive: str,
    resolution: int,
    images: int,
    classes: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if test_data is None:
        pytest.skip("SAGAN_TEST_DATA names no folder with real collections")
    collection = pack(f"{tmp_path}/set", PackSection(source=f"{test_data}/{archive}", resolution=resolution))
    printed = capsys.readouterr().out
    assert (collection.size("train"), collection.classes) == (images, classes)
    assert "warning" not in printed, "no two images are equal, and classes are even"
    assert len(Path(collection.url, "keys.txt").read_text().splitlines()) == images
    verify(collection.url)
    assert Image.open(f"{collection.url}/preview.png").width > 200
    stream = Stream(
        collection, "train", seed=0, world=World(), data=DataSection(train=collection.url, cache=f"{tmp_path}/cache")
    )
    try:
        batch = next(stream.batches(0, images))
    finally:
        stream.close()
    assert batch.images.shape == (images, 3, resolution, resolution)
    assert len({image.numpy().tobytes() for image in batch.images}) == images
    assert np.bincount(batch.labels).tolist() == np.bincount(collection.labels).tolist()
