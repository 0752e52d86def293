"""NCCL's collectives in a recorded step: with one rank here, and with all GPUs where there are several."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def ran(module, ranks):
    """Run a module of this folder in `ranks` processes. As a module it finds `sagan` where that is not installed."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*torchrun, "--module", f"tests.gpu.{module}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_recorded_step_calls_collectives():
    """The step has what several ranks have: DDP's sums, a gather, a broadcast."""
    done = ran("recorded_collectives", 1)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU: no ranks to compare")
def test_recorded_ranks_equal_one_process():
    done = ran("recorded_ranks", 2)
    assert done.returncode == 0, done.stderr[-4000:]
