"""The whole job on a CUDA device, through Ray; not run where Ray is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_digits_train_on_the_device(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: the whole job was not run")
    overrides = [
        "train.workers=1",
        "train.precision=bf16",
        "train.kimg=6.4",
        "evaluate.gpus=0",
        "resources.device=cuda",
    ]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "SAGAN_BUCKET": str(tmp_path), "PYTHONPATH": paths}
    command = [sys.executable, "-m", "pipeline", "run", str(ROOT / "jobs" / "quickstart.yaml"), *overrides]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    summary = json.loads((tmp_path / "runs" / "quickstart" / "summary.json").read_text())
    assert summary["images"] == 6400
    assert summary["registered"]["alias"] == "champion"
