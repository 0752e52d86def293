"""Packing from bucket to bucket by the tasks of a Ray cluster, as its users start it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.collection.manifest import Collection
from pipeline.collection.shard_file import read_shard
from pipeline.config.schema import PackSection
from pipeline.packing.pack import pack
from pipeline.storage import files

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.system, pytest.mark.slow]

CHECKOUT = Path(__file__).parents[2]


def start(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=folder,
        env={**os.environ, **environment, "PYTHONPATH": str(CHECKOUT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, test_data: Path | None) -> Path:
    """A tar of images in classes: real ones where there are some."""
    if test_data is not None:
        return test_data / "cifar10-test-1017.tar"
    folder = tmp_path_factory.mktemp("source")
    noise = np.random.default_rng(0)
    for i in range(300):
        path = folder / "set" / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    with tarfile.open(folder / "set.tar", "w") as tar:
        tar.add(folder / "set", "set")
    return folder / "set.tar"


def test_a_cluster_packs_and_resumes_and_verifies_as_one_machine_does(
    s3: Any, ray_cluster: Any, source: Path, tmp_path: Path
) -> None:
    bucket = s3.bucket()
    files.upload(source, f"{bucket}/source.tar")
    section = PackSection(source=str(source), resolution=32, shard_images=30)
    alone = pack(f"{tmp_path}/alone", section)
    wanted = {"source": f"{bucket}/source.tar", "resolution": 32, "shard_images": 30}
    job = {"kind": "pack", "name": "cluster", "destination": f"{bucket}/set", "pack": wanted}
    (tmp_path / "pack.yaml").write_text(json.dumps(job))

    killed = start(ray_cluster.env, tmp_path, "run", "pack.yaml")
    assert killed.stderr is not None
    assert any("tasks of the Ray cluster" in line for line in killed.stderr)
    assert any("packing: " in line for line in killed.stderr)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not files.exists(f"{bucket}/set/manifest.json")
    assert files.exists(f"{bucket}/set/.packing"), "what it had done"

    out, err = (process := start(ray_cluster.env, tmp_path, "run", "pack.yaml")).communicate()
    assert process.returncode == 0, err
    assert Collection.open(f"{bucket}/set").digest == alone.digest
    assert not files.exists(f"{bucket}/set/.packing")
    assert "next: sagan run" in out

    shard = alone.shards[1]
    sample = read_shard(Path(alone.url, shard.name))[3]
    data = bytearray(files.read_bytes(f"{bucket}/set/{shard.name}"))
    data[sample.offset + sample.length // 2] ^= 255
    files.write_bytes(f"{bucket}/set/{shard.name}", bytes(data))
    out, err = (process := start(ray_cluster.env, tmp_path, "verify", f"{bucket}/set")).communicate()
    assert process.returncode == 1
    assert "tasks of the Ray cluster" in err
    assert f"{shard.name}: {sample.name}: " in err
    keys = Path(alone.url, "keys.txt").read_text().splitlines()
    assert out == f"{keys[alone.shards[0].count + 3]}\n"
