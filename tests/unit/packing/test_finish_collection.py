"""The end of packing prints warnings about the collection and the command that trains on it."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.collection.manifest import Collection
from pipeline.config.job_file import load_job, parse_overrides
from pipeline.config.schema import PackSection, TrainJob
from pipeline.packing.finish_collection import next_command
from pipeline.packing.pack import pack
from tests.shipped_jobs import JOBS
from tests.unit.packing.coloured_images import png


class TestWarnings:
    @staticmethod
    def warnings(folder: Path, contents: dict[str, bytes], capsys: pytest.CaptureFixture[str]) -> str:
        for name, data in contents.items():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes(data)
        pack(f"{folder}/set", PackSection(source=f"{folder}/source", resolution=32, max_broken=1))
        return capsys.readouterr().out

    def test_an_ordinary_source_has_no_warnings(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = self.warnings(
            tmp_path,
            {f"{name}/{n}.png": png(9, 9, n + 99 * k) for n in range(3) for k, name in enumerate("ab")},
            capsys,
        )
        assert "warning" not in out
        assert "note" not in out
        assert "left out" not in out

    def test_duplicates_within_and_across_splits(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        contents = {
            "train/a/1.png": png(9, 9),
            "train/a/2.png": png(20, 9),
            "val/b/3.png": png(9, 9),
            "train/b/4.png": png(9, 9, 5),
        }
        out = self.warnings(tmp_path, contents, capsys)
        assert "2 images with the same bytes as an earlier image" in out
        assert "1 of them are in two splits" in out
        assert "1 of them have another label than the earlier image" in out

    def test_uneven_classes(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = self.warnings(
            tmp_path, {f"a/{n}.png": png(9, 9, n) for n in range(40)} | {"b/0.png": png(9, 9, 99)}, capsys
        )
        assert "'a' has 40 images, 'b' only 1" in out

    def test_classes_without_images(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Never there, of an unsupported format, or broken."""
        (tmp_path / "source" / "empty").mkdir(parents=True)
        contents = {"a/0.png": png(9, 9), "b/0.png": png(9, 9, 1), "phone/0.heic": b"x", "broken/0.png": b"x"}
        out = self.warnings(tmp_path, contents, capsys)
        assert "folders without images are not classes: empty, phone" in out
        assert "left out  1  .heic  unsupported format, for example phone/0.heic" in out
        assert "left out  1  .png   cannot be used, for example broken/0.png" in out
        assert "taken     2  .png" in out
        assert "train: 1 classes have no images: broken" in out

    def test_labels_that_are_all_equal(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        contents = {"train/a/0.png": png(9, 9), "train/a/1.png": png(9, 9, 1), "val/b/0.png": png(9, 9, 2)}
        assert "train: all images have the same label, 'a'" in self.warnings(tmp_path, contents, capsys)

    def test_one_class(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "there is only one class, 'a'" in self.warnings(tmp_path, {"a/0.png": png(9, 9)}, capsys)


@pytest.mark.parametrize("resolution", [32, 64, 128, 256])
@pytest.mark.parametrize("classes", [0, 2, 200, 1000])
def test_the_next_command_names_a_job_that_fits(packed: Collection, resolution: int, classes: int) -> None:
    names = [str(i) for i in range(classes)]
    large = {"train": range(10_001)}
    found = next_command(
        replace(packed, resolution=resolution, class_names=names, url="s3://bucket/my set", splits=large)
    )
    sagan, run, path, override = shlex.split(found)
    assert (sagan, run, override) == ("sagan", "run", "data.train=s3://bucket/my set")
    job = load_job(JOBS.parent / path)
    assert isinstance(job, TrainJob)
    assert job.model.resolution == resolution
    assert job.model.num_classes in (None, classes)


@pytest.mark.parametrize(
    ("splits", "augments"),
    [
        ({"train": range(10_000), "heldout": range(10_000, 60_000)}, True),
        ({"train": range(10_001), "heldout": range(10_001, 10_101)}, False),
        ({"val": range(500)}, True),
    ],
)
def test_the_next_command_augments_a_small_collection(
    packed: Collection, splits: dict[str, range], augments: bool
) -> None:
    _, _, path, *overrides = shlex.split(next_command(replace(packed, splits=splits)))
    job = load_job(JOBS.parent / path, parse_overrides(overrides))
    assert isinstance(job, TrainJob)
    assert job.data.augment == ("diffaugment" if augments else None)
    assert job.data.split == next(iter(splits))
