"""Published layouts, written here as their publishers write them: every image must come out with its own class."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from pipeline.collection.manifest import Collection
from pipeline.config.schema import PackSection
from pipeline.errors import UsageError
from pipeline.packing.pack import pack
from pipeline.packing.recognise import open_source
from tests.unit.packing.coloured_images import by_colour, colour, picture, tar, write
from tests.unit.packing.read_collection import stored


class TestImageNet:
    @pytest.fixture(scope="class")
    @classmethod
    def lists(cls, test_data: Path | None) -> dict[str, str]:
        if test_data is None:
            pytest.skip("SAGAN_TEST_DATA names no folder with the lists of ImageNet's classes")
        names = ("imagenet_class_index.json", "imagenet_map_clsloc.txt", "ILSVRC2012_validation_ground_truth.txt")
        return {name: (test_data / name).read_text() for name in names}

    @pytest.fixture(scope="class")
    @classmethod
    def wnids(cls, lists: dict[str, str]) -> list[str]:
        return [wnid for wnid, _ in json.loads(lists["imagenet_class_index.json"]).values()]

    @pytest.fixture(scope="class")
    @classmethod
    def train(cls, wnids: list[str]) -> bytes:
        """A tar of 1 000 tars; the colour of an image is its class's number."""
        return tar(
            {
                f"{wnid}.tar": tar({f"{wnid}_{n}.JPEG": picture(i // 256, i % 256, n) for n in range(2)})
                for i, wnid in enumerate(wnids)
            }
        )

    def test_a_tar_of_tars_has_a_thousand_classes_in_the_usual_order(
        self, train: bytes, lists: dict[str, str], wnids: list[str], tmp_path: Path
    ) -> None:
        (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(train)
        source = open_source(f"{tmp_path}/ILSVRC2012_img_train.tar")
        assert source.class_names == wnids, "without a list of names beside it"
        for i, label in enumerate(source.labels):
            assert colour(source.read(i))[:2] == (label // 256, label % 256)
        write(tmp_path, {"imagenet_class_index.json": lists["imagenet_class_index.json"]})
        named = open_source(f"{tmp_path}/ILSVRC2012_img_train.tar").class_names
        assert (named[0], named[1], named[207]) == ("tench", "goldfish", "golden retriever")
        assert len(set(named)) == 1000, "names that two classes share are told apart"
        assert {"crane (n02012849)", "crane (n03126707)"} <= set(named)

    def test_validation_images_get_their_class_through_the_mapping(
        self, lists: dict[str, str], test_data: Path, tmp_path: Path
    ) -> None:
        """Imagenette keeps the names of ImageNet's validation images in folders of the right class."""
        with tarfile.open(test_data / "imagenette128-train-1500.tar") as archive:
            known = [Path(name) for name in archive.getnames() if "ILSVRC2012_val_" in name]
        assert len(known) > 50
        colours = {path.name: (n // 256, n % 256, 9) for n, path in enumerate(known)}
        contents = {name: picture(*rgb) for name, rgb in colours.items()}
        write(tmp_path, {**lists, "ILSVRC2012_img_val.tar": tar(contents)})
        (tmp_path / "imagenet_class_index.json").unlink()
        (tmp_path / "imagenet_map_clsloc.txt").rename(tmp_path / "map")
        with pytest.raises(UsageError, match="without their ground truth") as caught:
            open_source(f"{tmp_path}/ILSVRC2012_img_val.tar")
        assert "imagenet_map_clsloc.txt" in caught.value.remedy
        (tmp_path / "map").rename(tmp_path / "imagenet_map_clsloc.txt")
        name_of = {line.split()[0]: line.split()[2] for line in lists["imagenet_map_clsloc.txt"].splitlines()}
        expected = {colours[path.name]: ("train", name_of[path.parent.name].replace("_", " ")) for path in known}
        assert by_colour(open_source(f"{tmp_path}/ILSVRC2012_img_val.tar")) == expected

    def test_both_official_tars_pack_as_one_collection(
        self, train: bytes, lists: dict[str, str], wnids: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Train and val in one folder with the lists: a thousand classes, readable, every pixel under its label."""
        truth = [int(line) for line in lists["ILSVRC2012_validation_ground_truth.txt"].split()]
        wnid_of = {int(line.split()[1]): line.split()[0] for line in lists["imagenet_map_clsloc.txt"].splitlines()}
        number_of = {wnid: i for i, wnid in enumerate(wnids)}
        numbers = range(1, 101)
        validation = {}
        for n in numbers:
            label = number_of[wnid_of[truth[n - 1]]]
            validation[f"ILSVRC2012_val_{n:08d}.JPEG"] = picture(label // 256, label % 256, 200)
        write(tmp_path / "set", {**lists, "ILSVRC2012_img_train.tar": train, "ILSVRC2012_img_val.tar": tar(validation)})
        collection = pack(f"{tmp_path}/packed", PackSection(source=f"{tmp_path}/set", resolution=32))
        assert {split: len(ids) for split, ids in collection.splits.items()} == {"train": 2000, "val": 100}
        assert (len(collection.class_names), collection.class_names[0]) == (1000, "tench")
        blues = {"train": {0, 1}, "val": {200}}
        for split, ids in collection.splits.items():
            for i in ids:
                r, g, b = colour(stored(collection, i))
                assert 256 * r + g == collection.labels[i]
                assert b in blues[split]
        printed = capsys.readouterr().out
        assert "val: " in printed
        assert "classes have no images" in printed, "100 images cannot show a thousand classes"
        tars = {
            split: f"{tmp_path}/set/ILSVRC2012_img_{name}.tar"
            for split, name in {"train": "train", "heldout": "val"}.items()
        }
        source = open_source(tars)
        assert source.class_names == collection.class_names
        assert {split: len(ids) for split, ids in source.splits.items()} == {"train": 2000, "heldout": 100}
        for i in range(0, 2100, 30):
            assert colour(source.read(i))[:2] == (source.labels[i] // 256, source.labels[i] % 256)


class TestCifar:
    @staticmethod
    def batches(images: dict[str, tuple[np.ndarray, str]], names: list[str]) -> dict[str, bytes]:
        """The files of the python version, rows in another order. images: key → (uint8 [32, 32, 3], class)."""
        keys = sorted(images)
        keys = [keys[i] for i in np.random.default_rng(1).permutation(len(keys))]
        parts = {f"data_batch_{n}": keys[n - 1 :: 6] for n in range(1, 6)} | {"test_batch": keys[5::6]}
        contents = {}
        for name, part in parts.items():
            batch = {
                "batch_label": name,
                "labels": [names.index(images[key][1]) for key in part],
                "data": np.stack([images[key][0].transpose(2, 0, 1).ravel() for key in part]),
                "filenames": part,
            }
            contents[f"cifar-10-batches-py/{name}"] = pickle.dumps(batch, protocol=2)
        meta = {"num_cases_per_batch": 10000, "label_names": names, "num_vis": 3072}
        contents["cifar-10-batches-py/batches.meta"] = pickle.dumps(meta, protocol=2)
        return contents

    @pytest.fixture(params=["noise", "real"])
    def images(
        self, request: pytest.FixtureRequest, images: Path, test_data: Path | None
    ) -> dict[str, tuple[np.ndarray, str]]:
        if request.param == "noise":
            return {
                path.name + path.parent.name: (np.asarray(Image.open(path)), path.parent.name)
                for path in images.rglob("*.png")
            }
        if test_data is None:
            pytest.skip("SAGAN_TEST_DATA names no folder with real collections")
        source = open_source(f"{test_data}/cifar10-test-1017.tar")
        return {
            Path(key).name: (np.asarray(Image.open(io.BytesIO(source.read(i)))), source.class_names[source.labels[i]])
            for i, key in enumerate(source.keys)
        }

    @pytest.mark.parametrize("form", ["folder", "tar.gz"])
    def test_the_python_version_gives_the_same_images_with_the_same_labels(
        self, images: dict[str, tuple[np.ndarray, str]], form: str, tmp_path: Path
    ) -> None:
        names = sorted({name for _, name in images.values()})
        contents = self.batches(images, names)
        place = tmp_path / "cifar-10-python.tar.gz"
        if form == "folder":
            place = write(tmp_path / "set", contents)
        else:
            with tarfile.open(place, "w:gz") as file:
                for name, data in contents.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    file.addfile(member, io.BytesIO(data))
        collection = pack(f"{tmp_path}/packed", PackSection(source=str(place), resolution=32))
        assert collection.class_names == names
        found: Counter[tuple[bytes, str]] = Counter()
        for i, label in enumerate(collection.labels):
            found[np.asarray(Image.open(io.BytesIO(stored(collection, i)))).tobytes(), names[label]] += 1
        assert found == Counter((pixels.tobytes(), name) for pixels, name in images.values())
        assert set(collection.splits) == {"test", "train"}

    def test_cifar_100_has_its_fine_labels(self, tmp_path: Path) -> None:
        names = [f"class{i:03d}" for i in range(100)]
        batch = {"fine_labels": [99, 0], "coarse_labels": [1, 1], "filenames": ["a.png", "b.png"]}
        batch["data"] = np.stack([np.full(3072, 7, np.uint8), np.full(3072, 8, np.uint8)])
        meta = {"fine_label_names": names, "coarse_label_names": ["x", "y"]}
        write(tmp_path / "cifar-100-python", {"train": pickle.dumps(batch), "meta": pickle.dumps(meta)})
        source = open_source(f"{tmp_path}/cifar-100-python")
        assert by_colour(source) == {(7, 7, 7): ("train", "class099"), (8, 8, 8): ("train", "class000")}

    def test_a_pickle_that_would_run_something_is_refused(self, tmp_path: Path) -> None:
        class Harm:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (tmp_path / "harm",))

        write(tmp_path / "set", {"data_batch_1": pickle.dumps(Harm()), "batches.meta": pickle.dumps({})})
        with pytest.raises(UsageError, match="would load pathlib"):
            open_source(f"{tmp_path}/set")
        assert not (tmp_path / "harm").exists()

    def test_another_compressed_tar_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "image.png").write_bytes(picture(1))
        with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as file:
            file.add(tmp_path / "image.png", "cat/image.png")
        with pytest.raises(UsageError, match="is compressed") as caught:
            open_source(f"{tmp_path}/set.tar.gz")
        assert "decompress it first" in caught.value.remedy
        (tmp_path / "set.tar.gz").write_bytes(b"no tar at all")
        with pytest.raises(UsageError, match="cannot be read as a tar"):
            open_source(f"{tmp_path}/set.tar.gz")

    def test_an_incomplete_cifar_is_refused(self, tmp_path: Path) -> None:
        write(
            tmp_path / "set", {"batches.meta": pickle.dumps({"label_names": ["a"]}), "data_batch_1": pickle.dumps({})}
        )
        with pytest.raises(UsageError, match="CIFAR is incomplete or damaged: KeyError.'filenames'"):
            open_source(f"{tmp_path}/set")


def test_tiny_imagenet(tmp_path: Path) -> None:
    root = write(
        tmp_path / "tiny-imagenet-200",
        {
            "train/n01443537/images/n01443537_0.JPEG": picture(1),
            "train/n01443537/n01443537_boxes.txt": "n01443537_0.JPEG\t0\t0\t1\t1\n",
            "train/n01629819/images/n01629819_0.JPEG": picture(2),
            "val/images/val_0.JPEG": picture(3),
            "val/images/val_1.JPEG": picture(4),
            "val/val_annotations.txt": "val_0.JPEG\tn01629819\t0\t0\t1\t1\nval_1.JPEG\tn01443537\t0\t0\t1\t1\n",
            "test/images/test_0.JPEG": picture(5),
            "words.txt": "n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\nn01629819\tfire salamander\n",
        },
    )
    source = open_source(str(root))
    assert by_colour(source) == {
        (1, 0, 0): ("train", "goldfish"),
        (2, 0, 0): ("train", "fire salamander"),
        (3, 0, 0): ("val", "fire salamander"),
        (4, 0, 0): ("val", "goldfish"),
    }
    assert source.notes == ["split test has no labels and is left out"]
    assert source.left_out is not None
    assert source.left_out["no labels in split test", ".jpeg"] == (1, "test/images/test_0.JPEG")
    expected = {(1, 0, 0): ("train", "goldfish"), (2, 0, 0): ("train", "fire salamander")}
    assert by_colour(open_source(f"{root}/train")) == expected


class TestCelebA:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        rows = ["000001.jpg -1  1", "000002.jpg  1 -1", "000003.jpg  1  1"]
        return write(
            tmp_path,
            {f"img_align_celeba/00000{n}.jpg": picture(n) for n in (1, 2, 3)}
            | {
                "list_attr_celeba.txt": "3\nSmiling Young \n" + "\n".join(rows) + "\n",
                "list_attr_celeba.csv": "image_id,Smiling,Young\n" + "\n".join(",".join(r.split()) for r in rows),
            },
        )

    @pytest.mark.parametrize("below", ["", "img_align_celeba"])
    def test_the_folder_has_no_classes(self, root: Path, below: str) -> None:
        source = open_source(f"{root}/{below}")
        assert by_colour(source) == {(n, 0, 0): ("train", None) for n in (1, 2, 3)}

    @pytest.mark.parametrize("table", ["list_attr_celeba.txt", "list_attr_celeba.csv"])
    def test_an_attribute_makes_two_classes(self, root: Path, table: str) -> None:
        source = open_source(f"{root}/{table}#Smiling")
        labels = {1: "not Smiling", 2: "Smiling", 3: "Smiling"}
        assert by_colour(source) == {(n, 0, 0): ("train", label) for n, label in labels.items()}

    def test_the_attribute_must_be_named(self, root: Path) -> None:
        with pytest.raises(UsageError, match="several columns could be the label.*Smiling, Young") as caught:
            open_source(f"{root}/list_attr_celeba.csv")
        assert "list_attr_celeba.csv#Young" in caught.value.remedy
        with pytest.raises(UsageError, match="no column 'Bald'"):
            open_source(f"{root}/list_attr_celeba.csv#Bald")


def test_lsun_categories_are_classes_and_other_folders_are_not(tmp_path: Path) -> None:
    names = [f"{n:x}" * 40 for n in range(4)]
    deep = {f"bedroom_train/{'/'.join(name[:6])}/{name}.webp": picture(n) for n, name in enumerate(names)}
    assert by_colour(open_source(str(write(tmp_path / "one", deep)))) == {(n, 0, 0): ("train", None) for n in range(4)}
    flat = {f"{category}_train/{names[n]}.webp": picture(n) for n, category in enumerate(["bedroom", "church_outdoor"])}
    assert by_colour(open_source(str(write(tmp_path / "two", flat)))) == {
        (0, 0, 0): ("train", "bedroom"),
        (1, 0, 0): ("train", "church_outdoor"),
    }


class TestWebDataset:
    @pytest.fixture
    def shards(self, tmp_path: Path) -> Callable[[Callable[[int], dict[str, Any]]], str]:
        """Two training shards and one for validation, of three images each, as the package itself writes them."""

        def build(label: Callable[[int], dict[str, Any]]) -> str:
            (tmp_path / "shards").mkdir()
            numbers = iter(range(9))
            for name in ("set-train-000.tar", "set-train-001.tar", "set-validation-000.tar"):
                with webdataset.TarWriter(f"{tmp_path}/shards/{name}") as sink:
                    for n in (next(numbers) for _ in range(3)):
                        sink.write({"__key__": f"some/{n:04d}", "png": picture(n)} | label(n))
            return f"{tmp_path}/shards"

        return build

    @pytest.mark.parametrize(
        ("label", "name"),
        [
            (lambda n: {"cls": n % 3}, lambda n: str(n % 3)),
            (lambda n: {"json": {"label": n % 3, "width": 8}}, lambda n: str(n % 3)),
            (lambda n: {"cls": "cat" if n % 2 else "dog"}, lambda n: "cat" if n % 2 else "dog"),
            (lambda n: {"txt": "a caption"}, lambda n: None),
        ],
        ids=["cls", "json", "words", "none"],
    )
    def test_shards_of_others_are_a_source(
        self, shards: Any, label: Callable[[int], Any], name: Callable[[int], Any]
    ) -> None:
        source = open_source(shards(label))
        assert by_colour(source) == {(n, 0, 0): ("train" if n < 6 else "val", name(n)) for n in range(9)}
        assert source.keys[0] == "set-train-000/some/0000.png"

    def test_packed_shards_are_a_source_too(self, packed: Collection, class_of: Callable[..., str]) -> None:
        source = open_source(packed.url)
        assert len(source.keys) == 60
        for i, label in enumerate(source.labels):
            pixels = np.asarray(Image.open(io.BytesIO(source.read(i))))
            assert packed.class_names[label] == class_of(pixels)

    def test_a_loose_image_is_no_part_of_a_sample(self, tmp_path: Path) -> None:
        shard = tar({"0.png": picture(0), "0.mask.png": picture(1), "0.cls": b"7"})
        source = open_source(str(write(tmp_path, {"shards-0.tar": shard, "ant/1.png": picture(2)})))
        assert source.left_out == {
            ("accompanies another image of its sample", ".png"): (1, "shards-0/0.mask.png"),
            ("not part of the data set", ".png"): (1, "ant/1.png"),
        }

    def test_tars_without_numbers_are_classes(self, tmp_path: Path) -> None:
        write(tmp_path / "set", {"n01440764.tar": tar({"1.JPEG": picture(1)}), "cat.tar": tar({"2.JPEG": picture(2)})})
        expected = {(1, 0, 0): ("train", "n01440764"), (2, 0, 0): ("train", "cat")}
        assert by_colour(open_source(f"{tmp_path}/set")) == expected


class TestParquet:
    @pytest.mark.parametrize("single", [True, False])
    def test_as_hugging_face_writes_it(self, tmp_path: Path, single: bool) -> None:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["dog", "cat"]}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        (tmp_path / "data").mkdir()
        for split, numbers in {"train": [0, 1, 2], "test": [3, 4]}.items():
            rows = {
                "image": [{"bytes": picture(n), "path": f"{n}.png"} for n in numbers],
                "label": [n % 2 for n in numbers],
            }
            pq.write_table(
                pa.table(rows).replace_schema_metadata(metadata), tmp_path / "data" / f"{split}-00000-of-00001.parquet"
            )
        expected = {(n, 0, 0): ("train" if n < 3 else "test", "cat" if n % 2 else "dog") for n in range(5)}
        if single:
            expected = {key: value for key, value in expected.items() if value[0] == "train"}
            source = open_source(f"{tmp_path}/data/train-00000-of-00001.parquet")
        else:
            source = open_source(str(tmp_path))
        assert by_colour(source) == expected
        assert source.class_names == ["dog", "cat"], "in the order of their numbers"

    def test_plain_bytes_and_words(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"jpg": [picture(1), picture(2)], "class": ["b", "a"]}), tmp_path / "set.parquet")
        expected = {(1, 0, 0): ("train", "b"), (2, 0, 0): ("train", "a")}
        assert by_colour(open_source(f"{tmp_path}/set.parquet")) == expected

    def test_numbers_without_names_are_in_their_order_and_none_is_minus_one(self, tmp_path: Path) -> None:
        rows = {"image": [picture(n) for n in range(3)], "label": [10, 9, 10]}
        pq.write_table(pa.table(rows), tmp_path / "set.parquet")
        source = open_source(f"{tmp_path}/set.parquet")
        assert (source.class_names, source.labels.tolist()) == (["9", "10"], [1, 0, 1])
        pq.write_table(pa.table(rows | {"label": [-1, -1, -1]}), tmp_path / "set.parquet")
        assert open_source(f"{tmp_path}/set.parquet").class_names == []

    def test_images_beside_parquet_files_are_left_out(self, tmp_path: Path) -> None:
        """A clone of a data set of Hugging Face: pictures for its card lie beside the data."""
        rows = {"image": [{"bytes": picture(n), "path": None} for n in range(2)], "label": ["cat", "dog"]}
        (tmp_path / "data").mkdir()
        pq.write_table(pa.table(rows), tmp_path / "data" / "train-00000-of-00001.parquet")
        pq.write_table(pa.table({"path": ["x"], "width": [9]}), tmp_path / "data" / "facts.parquet")
        write(tmp_path, {"assets/example.png": picture(9)})
        source = open_source(str(tmp_path))
        assert by_colour(source) == {(0, 0, 0): ("train", "cat"), (1, 0, 0): ("train", "dog")}
        assert source.left_out == {
            ("not part of the data set", ".png"): (1, "assets/example.png"),
            ("not an image", ".parquet"): (1, "data/facts.parquet"),
        }

    @pytest.mark.parametrize("form", ["folder", "tar"])
    def test_a_parquet_file_without_images_is_no_source_beside_images(self, form: str, tmp_path: Path) -> None:
        pq.write_table(pa.table({"file_name": ["cat/1.png"], "hash": [b"x"]}), tmp_path / "metadata.parquet")
        contents = {"cat/1.png": picture(1), "dog/2.png": picture(2)}
        contents["metadata.parquet"] = (tmp_path / "metadata.parquet").read_bytes()
        root = write(tmp_path, {"set.tar": tar(contents)}) / "set.tar"
        if form == "folder":
            root = write(tmp_path / "set", contents)
        assert by_colour(open_source(str(root))) == {(1, 0, 0): ("train", "cat"), (2, 0, 0): ("train", "dog")}


class TestNumberedFolders:
    @pytest.mark.parametrize(
        "names",
        [
            ["00000/00005.png", "01000/01003.png", "02000/02999.png"],
            ["00000/img00000007.png", "00001/img00001000.png"],
            ["00000/000000012.png", "00001/000010003.png"],
            ["0001/1001.png", "0123/2123.png"],
        ],
        ids=["FFHQ", "StyleGAN", "img2dataset", "Danbooru"],
    )
    def test_bundles_are_not_classes(self, names: list[str], tmp_path: Path) -> None:
        source = open_source(str(write(tmp_path / "set", {name: picture(n) for n, name in enumerate(names)})))
        assert by_colour(source) == {(n, 0, 0): ("train", None) for n in range(len(names))}
        (note,) = source.notes
        assert note.startswith("folders that bundle images by their numbers are not classes")

    @pytest.mark.parametrize(
        "names",
        [
            ["0/0.png", "11/3.png", "2/1.png"],
            ["00000/00000_00029.png", "00001/00000_00029.png"],
            ["001/0001.png", "002/0001.png"],
        ],
        ids=["digits", "GTSRB", "restarting numbers"],
    )
    def test_numbered_classes_are_classes(self, names: list[str], tmp_path: Path) -> None:
        source = open_source(str(write(tmp_path / "set", {name: picture(n) for n, name in enumerate(names)})))
        assert by_colour(source) == {(n, 0, 0): ("train", name.split("/")[0]) for n, name in enumerate(names)}

    @pytest.mark.parametrize("labels", [None, [["00000/a.png", 4], ["00001/b.png", 2]]])
    @pytest.mark.parametrize("form", ["folder", "tar"])
    def test_stylegan_has_its_labels_in_a_list(self, labels: Any, form: str, tmp_path: Path) -> None:
        contents = {"00000/a.png": picture(0), "00001/b.png": picture(1)}
        contents["dataset.json"] = json.dumps({"labels": labels}).encode()
        write(tmp_path, {"set.tar": tar({f"set/{name}": data for name, data in contents.items()})})
        place = write(tmp_path / "set", contents) if form == "folder" else tmp_path / "set.tar"
        source = open_source(str(place))
        names = {0: "4", 1: "2"} if labels else {0: None, 1: None}
        assert by_colour(source) == {(n, 0, 0): ("train", name) for n, name in names.items()}

    @pytest.mark.parametrize("content", ['{"labels": [["00000/a.png"]]}', '{"labels": 7}', "{", "[" * 100_000])
    def test_a_damaged_list_is_refused(self, content: str, tmp_path: Path) -> None:
        write(tmp_path, {"00000/a.png": picture(0), "dataset.json": content})
        with pytest.raises(UsageError, match="cannot be read"):
            open_source(str(tmp_path))
