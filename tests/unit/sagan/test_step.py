"""A step keeps its numbers: those of earlier versions, of other passes, of bfloat16 to its digits."""

import math
from dataclasses import replace

import pytest
import torch

from sagan import ModelConfig, OptimConfig, Step, TrainState, batch_norm, step_graph
from sagan.attention import SelfAttention
from sagan.batch_norm import BatchNorm
from sagan.config import passes
from sagan.ranks import World
from sagan.spectral_norm import Conv2d
from sagan.step_graph import StepGraph
from tests.unit.sagan.training import ACGAN, BATCH, CONFIG, real, run, same

GOLDEN = [
    [2.1040396353925286, -3.420773416734215],
    [2.73524519730282, -0.977989376508686],
    [2.552908901721012, -1.0780490097802442],
    [1.2674257560692208, -1.3449395192049796],
    [1.7709991874629367, -0.38834810445766227],
    [2.4253864984837312, -0.059124942924536794],
    [1.0015563202773918, 0.6578944151387924],
    [0.6359453159426847, 1.3080472096569453],
    [0.6877393609590359, 1.7887636035287189],
    [0.10370919206404397, 1.6209910509856025],
]


def test_golden_losses():
    """Full digits of ten updates: whatever is meant to keep the numbers must keep these (CPU, float64)."""
    state = TrainState(CONFIG, OptimConfig(), seed=5).to(torch.float64)
    step = Step(state, BATCH)
    got = []
    for _ in range(10):
        pixels, y = real(state.images)
        got.append(step([(pixels.double(), y)])[:2].tolist())
    torch.testing.assert_close(*(torch.tensor(x, dtype=torch.float64) for x in (got, GOLDEN)), rtol=0, atol=1e-9)


def test_bf16_stays_near_float32():
    """bfloat16 has 8 bits: first losses agree to a few per cent, and nothing in the state changes its type."""
    exact, autocast = TrainState(CONFIG, OptimConfig(), seed=2), TrainState(CONFIG, OptimConfig(), seed=2)
    want, got = run(exact, 1)[0], run(autocast, 1, precision="bf16")[0]
    assert got == pytest.approx(want, rel=0.05, abs=0.05)
    assert {t.dtype for _, t in autocast.tensors()} == {torch.float32}


def test_the_learning_rates_of_a_decay_are_those_of_the_position():
    """The last step of a linear decay moves almost nothing, the first one as much as without it."""
    plain, decayed = (
        TrainState(CONFIG, OptimConfig(lr_decay_kimg=decay), seed=1) for decay in (None, (0.0, BATCH / 1000))
    )
    run(plain, 1)
    run(decayed, 1)
    assert same(plain, decayed)
    before = {name: parameter.clone() for name, parameter in decayed.generator.named_parameters()}
    run(decayed, 1)
    assert all(torch.equal(before[name], parameter) for name, parameter in decayed.generator.named_parameters())


class TestMicroBatches:
    @pytest.mark.parametrize("augment", [None, "diffaugment"])
    @pytest.mark.parametrize("differs", [{}, {"num_classes": 0}, {"architecture": "dcgan"}, ACGAN])
    def test_several_passes_are_the_same_step(self, differs, augment):
        config = replace(CONFIG, batch_norm_group=2, **differs)
        whole, parts = (TrainState(config, OptimConfig(), seed=1).to(torch.float64) for _ in range(2))
        for state, micro_batch in ((whole, None), (parts, 2)):
            step = Step(state, BATCH, micro_batch=micro_batch, augment=augment)
            assert step.passes == (4 if micro_batch else 1)
            for _ in range(3):
                pixels, y = real(state.images, size=config.known_resolution)
                step([(pixels.double(), y)])
        # 1e-9: sums in another order, see tests/system/test_equivalence.py
        for (name, a), (_, b) in zip(whole.tensors(), parts.tensors(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=name)

    def test_a_group_that_would_be_cut_is_refused(self):
        with pytest.raises(ValueError, match="batch of 8 on 1 workers .* at most 4 images: its 1 batch-norm group"):
            Step(TrainState(CONFIG, OptimConfig(), seed=1), BATCH, micro_batch=4)

    def test_passes_are_as_few_as_hold_whole_groups(self):
        assert passes(256, 2, 256 // 32, None) == 1
        assert passes(256, 2, 256 // 32, 64) == 2
        assert passes(256, 2, 256 // 32, 60) == 4
        with pytest.raises(ValueError, match="set model.batch_norm_group to at most 16"):
            passes(256, 2, 256 // 32, 16)


class TestTheStepOnTheDevice:
    @pytest.mark.parametrize("augment", [None, "diffaugment"])
    def test_a_step_does_not_wait_for_the_device(self, augment):
        """No value goes to the host inside a step, but for Adam's step counters, which are on the host here."""
        state = TrainState(CONFIG, OptimConfig(), seed=1)
        step = Step(state, BATCH, augment=augment)
        step([real(0)])
        with torch.profiler.profile() as profile:
            step([real(BATCH)])
        waits = [e for e in profile.events() if e.name == "aten::_local_scalar_dense"]
        outside = [e for e in waits if not _inside(e, "Optimizer.step")]
        assert not outside

    def test_autocast_leaves_statistics_and_states_float32(self):
        """Under bf16 every activation between convolutions is bfloat16; statistics, logits and states are float32."""
        state = TrainState(CONFIG, OptimConfig(), seed=1)
        seen = {}
        for network in (state.generator, state.discriminator):
            for name, module in network.named_modules():
                if isinstance(module, (Conv2d, BatchNorm, SelfAttention)):
                    key = f"{type(network).__name__}.{name}"
                    module.register_forward_hook(lambda _, __, out, key=key: seen.update({key: out.dtype}))
        run(state, 1, precision="bf16")
        assert set(seen.values()) == {torch.bfloat16}
        assert all(norm.batch_var.dtype == torch.float32 for norm in batch_norm.layers(state.generator))
        assert {tensor.dtype for _, tensor in state.tensors()} == {torch.float32}

    @pytest.mark.parametrize("augment", [None, "diffaugment"])
    def test_a_step_does_not_change_its_inputs(self, augment):
        """Rectifiers and sums work in place; the images they are given are not theirs."""
        state = TrainState(CONFIG, OptimConfig(), seed=1)
        pixels, y = real(0)
        before = pixels.clone()
        Step(state, BATCH, augment=augment)([(pixels, y)])
        assert torch.equal(pixels, before)


def _inside(event, prefix):
    while event is not None:
        if event.name.startswith(prefix):
            return event.name
        event = event.cpu_parent
    return None


def test_both_networks_of_an_ac_gan_learn_the_classes():
    """Classes are levels of brightness. A classifier that guesses costs λ ln 3 per image."""
    weight = 10.0
    optim = OptimConfig(lr_d=2e-3, lr_g=2e-3, auxiliary_weight=weight)
    state = TrainState(replace(CONFIG, condition_d="classifier"), optim, seed=1)
    step, metrics = Step(state, BATCH), []
    for _ in range(40):
        pixels, y = real(state.images)
        metrics.append(step([(0.3 * pixels + 0.7 * (y - 1)[:, None, None, None], y)]))
    loss_d, loss_g = torch.stack(metrics[-10:])[:, :2].mean(0).tolist()
    assert loss_d < 0.6 * 2 * weight * math.log(3)
    assert loss_g < weight * math.log(3)


def test_unconditional_training():
    state = TrainState(ModelConfig(resolution=32, num_classes=0, z_dim=8, channels_g=4, channels_d=4), OptimConfig(), 0)
    step = Step(state, BATCH)
    losses = step([real(0)])
    assert losses.isfinite().all()
    assert state.images == BATCH


def test_a_step_is_recorded_only_where_its_shapes_never_change(monkeypatch):
    monkeypatch.setattr(step_graph, "is_cuda", lambda device: device.type == "cuda")  # a CPU build knows no CUDA
    device = torch.device("cuda")
    assert StepGraph.serves(device, World(), 16)
    assert not StepGraph.serves(device, World(0, 3), 16), "the shares of three ranks are 6, 5 and 5, in turns"
    assert {len(World(0, 3).share(start, start + 16)) for start in (0, 16, 32)} == {5, 6}
    assert not StepGraph.serves(torch.device("cpu"), World(), 16)
