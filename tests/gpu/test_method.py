"""The method on a CUDA device equals the method on the CPU. Needs torch, numpy and safetensors alone."""

import dataclasses

import pytest
import torch

from pipeline.compute.torch_settings import configure_device
from sagan import Model, ModelConfig, OptimConfig, Step, TrainState
from sagan.random import Purpose, draw_labels, draw_latents
from sagan.step_graph import WARM_UP

SMALL = ModelConfig(resolution=32, num_classes=10, channels_g=8, channels_d=8, z_dim=16)
BATCH = 16
# A recorded step rounds learning rates to float32. These are powers of two.
OPTIM = OptimConfig(lr_d=2.0**-11, lr_g=2.0**-13)


@pytest.fixture(autouse=True)
def _settings_of_a_worker():
    configure_device(torch.device("cuda"))


def real(images, device, dtype):
    positions = range(images, images + BATCH)
    pixels = draw_latents(9, Purpose.DEQUANTISE, positions, 3 * 32 * 32).view(-1, 3, 32, 32).clamp(-1, 1)
    return pixels.to(device, dtype), draw_labels(9, Purpose.DEQUANTISE, positions, 10).to(device)


def trained(device, dtype, updates, precision="float32", *, graph=True, optim=OPTIM, model=SMALL, **options):
    state = TrainState(model, optim, seed=1, device=device).to(dtype)
    step = Step(state, BATCH, precision=precision, **options)
    step.graph = step.graph if graph else None
    losses = [step([real(state.images, device, dtype)]) for _ in range(updates)]
    return state, torch.stack(losses).double().cpu()


@pytest.mark.parametrize("augment", [None, "diffaugment"])
def test_five_updates_equal_the_cpus_in_float64(augment):
    """1e-9 for losses as between ranks (tests/system/test_equivalence.py): only the order of sums differs.

    Norms of gradients are about 40 here and differ by up to 1.02e-9 on an H200. Adam divides small gradients by their
    size, so states differ by more: by up to 1.9e-8 on one machine with an H200, and 1.1e-7 on another.
    """
    ours, losses = trained("cuda", torch.float64, 5, augment=augment)
    theirs, expected = trained("cpu", torch.float64, 5, augment=augment)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-9)
    for (name, a), (_, b) in zip(ours.tensors(), theirs.tensors(), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-6, msg=lambda message, name=name: f"{name}: {message}")


def test_a_recorded_step_equals_the_step():
    """The learning rate decays, and the moving average starts after some steps, so that a second step is recorded."""
    optim = dataclasses.replace(OPTIM, lr_decay_kimg=(0, 1), ema_start_kimg=(WARM_UP + 3) * BATCH / 1000)
    state, losses = trained("cuda", torch.float64, WARM_UP + 7, optim=optim)
    same, expected = trained("cuda", torch.float64, WARM_UP + 7, optim=optim, graph=False)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-6)  # the rate is rounded to float32
    for (name, a), (_, b) in zip(state.tensors(), same.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=lambda message, name=name: f"{name}: {message}")


@pytest.mark.parametrize("augment", [None, "diffaugment"])
def test_a_recorded_step_of_several_passes_equals_the_step(augment):
    model = dataclasses.replace(SMALL, batch_norm_group=BATCH // 2)
    options = {"micro_batch": BATCH // 2, "model": model, "augment": augment}
    state, losses = trained("cuda", torch.float64, WARM_UP + 4, **options)
    same, expected = trained("cuda", torch.float64, WARM_UP + 4, graph=False, **options)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-9)
    for (name, a), (_, b) in zip(state.tensors(), same.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7, msg=lambda message, name=name: f"{name}: {message}")


def test_bf16_trains_and_leaves_float32_states():
    state, losses = trained("cuda", torch.float32, 30, precision="bf16")
    _, exact = trained("cuda", torch.float32, 1)
    assert losses.isfinite().all()
    torch.testing.assert_close(losses[0], exact[0], rtol=0.05, atol=0.05)
    assert {tensor.dtype for _, tensor in state.tensors()} == {torch.float32}


def test_a_state_moves_between_devices(tmp_path):
    state, _ = trained("cuda", torch.float32, 2)
    state.save(tmp_path)
    on_cpu, back = TrainState.load(tmp_path), TrainState.load(tmp_path, "cuda")
    for (name, a), (_, b), (_, c) in zip(state.tensors(), on_cpu.tensors(), back.tensors(), strict=True):
        assert torch.equal(a.cpu(), b), name
        assert torch.equal(a, c), name


def test_the_full_model_steps_and_samples_at_128_px():
    config = ModelConfig(resolution=128, num_classes=1000, attention=(64,))
    state = TrainState(config, OptimConfig(), seed=0, device="cuda")
    step = Step(state, 32, precision="bf16")
    pixels = torch.rand(32, 3, 128, 128, device="cuda") * 2 - 1
    y = torch.arange(32, device="cuda")
    assert all(step([(pixels, y)]).isfinite().all() for _ in range(WARM_UP + 2))
    assert step.graph.records
    model = Model.from_state(state, standing_images=128)
    assert model.sample(n=4).shape == (4, 3, 128, 128)
