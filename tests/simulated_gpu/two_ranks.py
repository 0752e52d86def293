"""Two ranks train on the simulated GPU as they train on the CPU, bit for bit, and wait for no device in a step."""

from __future__ import annotations

import multiprocessing
import tempfile
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from pipeline.training.worker.rank_consistency import check_ranks
from sagan import ModelConfig, OptimConfig, Step, TrainState
from sagan.random import Purpose, draw_labels, draw_latents
from sagan.ranks import World
from tests.simulated_gpu import simulated_gpu
from tests.simulated_gpu.simulated_gpu import Record, host, upload

RANKS, BATCH, STEPS = 2, 5, 3  # unequal shares
BASE = ModelConfig(resolution=32, num_classes=10, channels_g=4, channels_d=4, z_dim=16, spectral_norm_start="cold")
CASES: list[tuple[ModelConfig, int, dict[str, Any]]] = [  # configuration, global batch, options of the step
    (BASE, BATCH, {"precision": "bf16"}),
    # groups lie inside a rank, and a step has two passes
    (replace(BASE, batch_norm_group=1), 4, {"micro_batch": 1, "augment": "diffaugment"}),
]


def test_two_ranks_train_as_on_the_cpu() -> None:
    """The processes are started by a server that imports the simulation before `sagan`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.simulated_gpu.simulated_gpu", "torch._dynamo"])
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank, args=(rank, f"{folder}/store")) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    assert [process.exitcode for process in ranks] == [0] * RANKS


def _rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    for case in CASES:
        with Record():
            theirs, expected = _train("cpu", *case)
            ours, found = _train(simulated_gpu.NAME, *case)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b), (a, b)
        for (name, a), (_, b) in zip(ours.tensors(), theirs.tensors(), strict=True):
            assert torch.equal(host(a), b), name
    dist.destroy_process_group()


def _train(
    device: str, config: ModelConfig, batch: int, options: dict[str, Any]
) -> tuple[TrainState, list[torch.Tensor]]:
    world = World.current()
    state = TrainState(config, OptimConfig(), seed=1, device=device)
    step = Step(state, batch, world, **options)
    metrics = []
    for _ in range(STEPS):
        positions, side = world.share(state.images, state.images + batch), config.known_resolution
        images = draw_latents(9, Purpose.DEQUANTISE, positions, 3 * side**2).view(-1, 3, side, side).clamp(-1, 1)
        labels = draw_labels(9, Purpose.DEQUANTISE, positions, config.known_num_classes)
        if device == simulated_gpu.NAME:
            images, labels = upload(images), upload(labels)
        with Record() as record:
            metrics.append(host(step([(images, labels)])))
        # DDP reads the order of its buckets once, after the first step.
        if state.images > 2 * batch:
            assert not record.syncs, record.syncs
            assert not record.pageable, record.pageable
        assert bool(record.collectives) == (device == simulated_gpu.NAME)
    with Record() as record:
        check_ranks(state, world)
    assert record.syncs.total() == (device == simulated_gpu.NAME), record.syncs
    return state, metrics
