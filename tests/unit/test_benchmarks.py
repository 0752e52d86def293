"""Benchmarks of real images say at once which files they need; `make bench` runs every benchmark."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("checks", "imagenette128-train-1500.tar"),
        ("evaluation", "resnet56-cifar10.ts"),
        ("learning", "resnet56-cifar10.ts"),
        ("small_collections", "cifar10-test-1017.tar"),
        ("stream", "imagenette128-train-1500.tar"),
    ],
)
@pytest.mark.parametrize("folder", ["unset", "empty", "incomplete"])
def test_missing_images_end_a_benchmark_at_once(
    name: str,
    file: str,
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "cifar10-train-5000.tar").touch()
    monkeypatch.delenv("SAGAN_TEST_DATA", raising=False)
    if folder != "unset":
        monkeypatch.setenv("SAGAN_TEST_DATA", "" if folder == "empty" else str(tmp_path))
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit) as ended:
        import_module(f"tests.benchmarks.{name}").main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "SAGAN_TEST_DATA" in error
    assert file in error or folder != "incomplete"


def test_make_bench_runs_programs_only() -> None:
    shown = subprocess.run(["make", "-n", "-o", "setup", "bench"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = shown.stdout.partition("for name in ")[2].partition(";")[0].split()
    assert {"evaluation", "learning", "stream"} <= set(names)
    assert [name for name in names if name.startswith("_")] == []
