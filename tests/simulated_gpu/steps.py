"""Training on the simulated GPU equals training on the CPU, bit for bit, and never waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.training.worker.finite_check import first_not_finite
from sagan import Model, ModelConfig, OptimConfig, Step, TrainState
from sagan.discriminator import Discriminator
from sagan.generator import Generator
from sagan.random import Purpose, draw_labels, draw_latents
from sagan.resample import double, halve
from tests.benchmarks.counts import Counts
from tests.simulated_gpu import simulated_gpu
from tests.simulated_gpu.simulated_gpu import Record, host, upload

BATCH = 4
BASE = ModelConfig(resolution=32, num_classes=10, channels_g=4, channels_d=4, z_dim=16, spectral_norm_start="cold")
ACGAN: dict[str, Any] = {"architecture": "acgan", "resolution": 128, "channels_g": 2, "channels_d": 1, "slope_d": 0.2}
SYSTEMS = {
    "conditional": (replace(BASE, spectral_norm_start="converged"), OptimConfig()),
    "unconditional": (replace(BASE, num_classes=0), OptimConfig()),
    "groups of 2": (replace(BASE, batch_norm_group=2), OptimConfig()),
    "SNGAN-projection": (replace(BASE, thin_d=True, attention=()), OptimConfig(n_dis=2, lr_decay_kimg=(0, 1))),
    "norm on D only": (replace(BASE, spectral_norm_g=False), OptimConfig()),
    "official norm": (replace(BASE, spectral_norm_gradient="through"), OptimConfig()),
    "icml": (replace(BASE, attention=(8, 16), attention_form="icml"), OptimConfig()),
    "first": (replace(BASE, attention_form="first"), OptimConfig()),
    "residual control": (replace(BASE, attention_form="residual_3x3"), OptimConfig()),
    "DCGAN": (replace(BASE, architecture="dcgan", attention=(), spectral_norm_d=False), OptimConfig(loss="bce")),
    "AC-GAN": (replace(BASE, condition_d="classifier"), OptimConfig(loss="bce")),
    "AC-GAN of 2017": (replace(BASE, **ACGAN, condition_d="classifier"), OptimConfig(loss="bce")),
    "leaky": (replace(BASE, num_classes=0, slope_g=0.02, slope_d=0.2), OptimConfig()),
    "attention at 32": (
        replace(BASE, resolution=64, channels_d=8, attention=(32,), multipliers_g=(2,) * 5, multipliers_d=(1,) * 5),
        OptimConfig(),
    ),
}


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    """torch reaches the simulated device only while a record is kept."""
    with Record():
        yield


def real(config: ModelConfig, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    positions, side = range(position, position + BATCH), config.known_resolution
    pixels = draw_latents(9, Purpose.DEQUANTISE, positions, 3 * side**2).view(-1, 3, side, side).clamp(-1, 1)
    return pixels, draw_labels(9, Purpose.DEQUANTISE, positions, config.num_classes or 1)


def train(
    config: ModelConfig, optim: OptimConfig, precision: str, device: str, **options: Any
) -> tuple[TrainState, list[torch.Tensor]]:
    """Two steps. On the device, nothing in them may wait for it."""
    state = TrainState(config, optim, seed=1, device=device)
    step = Step(state, BATCH, precision=precision, **options)
    metrics = []
    for _ in range(2):
        batches = [real(config, state.images + BATCH * i) for i in range(optim.n_dis)]
        if device == simulated_gpu.NAME:
            batches = [(upload(images), upload(labels)) for images, labels in batches]
        with Record() as record:
            metrics.append(host(step(batches)))
        assert not record.syncs, "the host waits for the device"
        assert not record.pageable, "a copy from memory that is not page-locked"
        assert (record.operators.total() > 0) == (device == simulated_gpu.NAME)
    return state, metrics


@pytest.mark.parametrize(
    ("system", "precision"),
    [*((system, "bf16") for system in SYSTEMS), *((system, "float32") for system in ("conditional", "DCGAN"))],
)
def test_a_system_trains_as_on_the_cpu(system: str, precision: str) -> None:
    """Bits differ in bf16 where CUDA's autocast lists differ from the CPU's: an operator then has another dtype."""
    config, optim = SYSTEMS[system]
    theirs, expected = train(config, optim, precision, "cpu")
    ours, found = train(config, optim, precision, simulated_gpu.NAME)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    for (name, a), (_, b) in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert torch.equal(host(a), b), name


@pytest.mark.parametrize(
    ("system", "options"),
    [
        ("groups of 2", {"micro_batch": 2}),
        ("groups of 2", {"micro_batch": 2, "augment": "diffaugment"}),
        ("unconditional", {"augment": "diffaugment"}),
        ("SNGAN-projection", {"augment": "diffaugment"}),
        ("DCGAN", {"augment": "diffaugment"}),
        ("AC-GAN", {"augment": "diffaugment"}),
    ],
)
def test_options_train_as_on_the_cpu(system: str, options: dict[str, Any]) -> None:
    config, optim = SYSTEMS[system]
    _, expected = train(config, optim, "bf16", "cpu", **options)
    _, found = train(config, optim, "bf16", simulated_gpu.NAME, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_state_is_saved_and_loaded_on_the_device(tmp_path: Path) -> None:
    state, _ = train(*SYSTEMS["conditional"], "float32", simulated_gpu.NAME)
    state.save(tmp_path)
    on_cpu, back = TrainState.load(tmp_path), TrainState.load(tmp_path, simulated_gpu.NAME)
    for (name, a), (_, b), (_, c) in zip(state.tensors(), on_cpu.tensors(), back.tensors(), strict=True):
        assert torch.equal(host(a), b), name
        assert torch.equal(host(c), b), name


def test_a_checkpoint_waits_twice(tmp_path: Path) -> None:
    """Once for whether all of its hundreds of tensors are finite, and once for their copies."""
    state, _ = train(*SYSTEMS["conditional"], "float32", simulated_gpu.NAME)
    with Record() as record:
        assert first_not_finite(state) is None
        assert record.syncs.total() == 1
        state.copied().save(tmp_path)
    assert record.syncs.total() == 2


def test_samples_are_the_cpus() -> None:
    """Standing statistics and images."""
    state, _ = train(*SYSTEMS["conditional"], "float32", simulated_gpu.NAME)
    same, _ = train(*SYSTEMS["conditional"], "float32", "cpu")
    found, expected = (Model.from_state(s, standing_images=16).sample(n=4, seed=3) for s in (state, same))
    assert torch.equal(host(found), expected)


def test_resampling_keeps_bfloat16() -> None:
    """CUDA's autocast runs nearest upsampling in float32, which doubles its bytes."""
    x = upload(torch.ones(1, 2, 4, 4, dtype=torch.bfloat16)).requires_grad_()
    with torch.autocast(simulated_gpu.NAME, torch.bfloat16):
        doubled = double(x)
        assert doubled.dtype == halve(doubled).dtype == torch.bfloat16
        halve(doubled).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("network", [Generator, Discriminator])
def test_no_kernel_gets_more_elements_than_it_counts(network: Any) -> None:
    """Pooling and upsampling kernels of CUDA count in 32 bits. A map of 512 images at 256 px has too many elements."""
    largest = 0

    def observe(func: Any, given: Any, out: Any) -> None:
        nonlocal largest
        if any(name in str(func) for name in ("avg_pool2d", "upsample")):
            largest = max(largest, given[0][0].numel(), out.numel())

    config = ModelConfig(resolution=256, num_classes=10)
    made, device = network(config), simulated_gpu.NAME
    with Record("meta", observe), torch.no_grad():
        shape = (512, config.z_dim) if network is Generator else (512, 3, 256, 256)
        made.to(device)(torch.empty(shape, device=device), torch.zeros(512, dtype=torch.int64, device=device))
    assert 0 < largest < 2**31


# --- planted faults: the simulation notices them ---------------------------------------------------------------------


def test_a_tensor_of_the_cpu_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="one device"):
        upload(torch.ones(3)) + torch.ones(3)


def test_a_wait_of_the_host_is_noticed() -> None:
    with Record() as record:
        upload(torch.ones(3)).sum().item()
    assert [key.split()[0] for key in record.syncs] == ["_local_scalar_dense"]


def test_a_pageable_copy_is_noticed() -> None:
    with Record() as record:
        torch.ones(3).to(simulated_gpu.NAME)
        torch.ones(3).pin_memory().to(simulated_gpu.NAME)
    assert record.pageable.total() == 1


def test_a_copy_that_nobody_waits_for_holds_no_numbers() -> None:
    with Record() as record:
        copied = upload(torch.ones(3)).to("cpu", non_blocking=True)
        assert copied.isnan().all()
        assert not record.syncs
        simulated_gpu.current_stream().synchronize()
        assert torch.equal(copied, torch.ones(3))
    assert [key.split()[0] for key in record.syncs] == ["synchronize"]


def test_a_masked_index_is_a_wait() -> None:
    with Record() as record:
        x = upload(torch.ones(3))
        x[x > 0]
    assert [key.split()[0] for key in record.syncs] == ["index"]


def test_a_collective_with_a_tensor_of_the_cpu_is_noticed(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with Record() as record:
            dist.all_reduce(ours := upload(torch.ones(3)))
            assert torch.equal(host(ours), torch.ones(3))
            assert record.collectives == {"allreduce_": 1}
            with pytest.raises(RuntimeError, match="one device"):
                dist.all_gather([torch.empty(3)], ours)
    finally:
        dist.destroy_process_group()


def test_a_stream_that_does_not_wait_is_noticed() -> None:
    stream = simulated_gpu.Stream()
    with simulated_gpu.on_stream(stream):
        made = upload(torch.ones(3))
    with pytest.raises(RuntimeError, match="another stream"):
        made + 1
    simulated_gpu.current_stream().wait_stream(stream)
    with pytest.raises(RuntimeError, match="record_stream"):
        made + 1
    made.record_stream(simulated_gpu.current_stream())  # type: ignore[arg-type]
    assert torch.equal(host(made + 1), torch.full((3,), 2.0))


def test_autocast_follows_cudas_lists() -> None:
    with torch.autocast(simulated_gpu.NAME, torch.bfloat16):
        x = upload(torch.ones(1, 1, 2, 2))
        assert torch.nn.functional.conv2d(x, x).dtype == torch.bfloat16
        assert x.bfloat16().softmax(1).dtype == torch.float32
        assert torch.mv(x[0, 0], x[0, 0, 0]).dtype == torch.bfloat16, "the CPU's lists leave mv alone"


# --- the model of the cost, on examples that can be counted by hand --------------------------------------------------


@pytest.mark.parametrize(
    ("operate", "launches", "moved"),
    [
        (lambda x: x + x[0], 1, 4 * (1000 + 10 + 1000)),
        (lambda x: x.add_(1), 1, 4 * (1000 + 1000)),
        (lambda x: x.zero_(), 1, 4 * 1000),
        (lambda x: x.view(10, 100).t()[1:], 0, 0),
        (lambda x: torch.empty_like(x), 0, 0),
        (lambda x: x[0].expand(100, 10) * 2, 1, 4 * (10 + 1000)),
        (lambda x: x[torch.zeros(7, dtype=torch.int64, device=simulated_gpu.NAME)], 2, 4 * 2 * 70 + 8 * (7 + 7)),
        (lambda x: torch._foreach_mul_([torch.empty_like(x) for _ in range(111)], 2.0), 2, 4 * 2 * 111 * 1000),
        (lambda x: torch._foreach_mul_([x.new_empty(321, 65536)], 2.0), 2, 4 * 2 * 321 * 65536),
    ],
)
def test_launches_and_bytes(operate: Callable[[torch.Tensor], object], launches: int, moved: int) -> None:
    counts = Counts()
    with Record("meta", counts):
        x = torch.empty(100, 10, device=simulated_gpu.NAME)
        counts.clear()
        operate(x)
    assert sum(row.launches for row in counts.rows.values()) == launches
    assert sum(row.bytes for row in counts.rows.values()) == moved


def test_live_memory() -> None:
    counts = Counts()
    with Record("meta", counts):
        x = torch.empty(2**20, 256, device=simulated_gpu.NAME)
        y = x + 1
        del y
        counts.clear()
        x.view(-1).add_(1)
        assert counts.figures()["live_gib"] == 1
        x = x * 2
        assert counts.figures()["live_gib"] == 2
