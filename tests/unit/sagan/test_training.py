"""A state is everything a step reads and changes: saved, moved and resumed it goes on bit for bit."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import sagan
from sagan import Model, ModelConfig, OptimConfig, Step, TrainState, batch_norm
from sagan.attention import SelfAttention
from sagan.batch_norm import BatchNorm
from sagan.random import Purpose, labels, latents
from sagan.spectral_norm import Conv2d
from sagan.state import FORMAT
from sagan.step import passes

CONFIG = ModelConfig(resolution=32, classes=3, z_dim=8, channels_g=4, channels_d=4)
BATCH = 8


def real(images, classes=3):
    """A batch of images and labels at a position, without any data set."""
    positions = range(images, images + BATCH)
    pixels = latents(9, Purpose.DEQUANTISE, positions, 3 * 32 * 32).view(-1, 3, 32, 32).clamp(-1, 1)
    return pixels, labels(9, Purpose.DEQUANTISE, positions, classes)


def run(state, steps, **kwargs):
    step = Step(state, BATCH, **kwargs)
    return [step([real(state.images + k * BATCH) for k in range(state.optim.n_dis)]).tolist() for _ in range(steps)]


def same(a, b):
    ours, theirs = dict(a.tensors()), dict(b.tensors())
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("n_dis", [1, 2])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, n_dis):
    optim = OptimConfig(n_dis=n_dis, ema_decay=0.9, ema_start_kimg=0.02)
    whole = TrainState(CONFIG, optim, seed=1)
    losses = run(whole, 5)
    first = TrainState(CONFIG, optim, seed=1)
    run(first, 2)
    first.save(tmp_path)
    second = TrainState.load(tmp_path)
    assert second.images == 2 * n_dis * BATCH
    assert same(first, second)
    assert run(second, 3) == losses[2:]
    assert same(whole, second)


def test_the_average_is_a_copy_until_it_starts():
    state = TrainState(CONFIG, OptimConfig(ema_decay=0.9, ema_start_kimg=2 * BATCH / 1000), seed=1)
    weights = dict(state.generator.named_parameters())
    run(state, 1)
    assert all(torch.equal(average, weights[name]) for name, average in state.average.items())
    run(state, 1)
    name = "conv.weight"
    assert not torch.equal(state.average[name], weights[name])


def test_another_format_is_refused_by_name(tmp_path):
    TrainState(CONFIG, OptimConfig(), seed=0).save(tmp_path)
    facts = tmp_path / "state.json"
    facts.write_text(facts.read_text().replace(f'"format": {FORMAT}', '"format": 99'))
    with pytest.raises(ValueError, match="format 99"):
        TrainState.load(tmp_path)


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


@pytest.mark.parametrize(
    ("model", "optim"),
    [
        pytest.param({"attention_form": "icml"}, {}, id="attention of the paper"),
        pytest.param({"attention_form": "first"}, {}, id="attention of the first version"),
        pytest.param({"spectral_norm_g": False}, {"lr_d": 1e-4}, id="norm on D only, equal rates"),
        pytest.param({"spectral_norm_gradient": "through", "spectral_norm_start": "cold"}, {}, id="official norm"),
        pytest.param({"thin_d": True, "attention": ()}, {"lr_decay_kimg": (0, 1), "n_dis": 2}, id="SNGAN-projection"),
        pytest.param({"classes": 0, "slope_g": 0.02, "slope_d": 0.02}, {}, id="leaky, unconditional"),
    ],
)
def test_every_system_resumes_bit_for_bit(model, optim, tmp_path):
    config, rates = replace(CONFIG, **model), OptimConfig(**optim)
    whole, first = TrainState(config, rates, seed=1), TrainState(config, rates, seed=1)
    losses = run(whole, 3)
    run(first, 1)
    first.save(tmp_path)
    second = TrainState.load(tmp_path)
    assert run(second, 2) == losses[1:]
    assert same(whole, second)


def test_learning_rates_fall_to_zero():
    """The last step of a linear decay moves almost nothing, the first one as much as without it."""
    assert [OptimConfig(lr_decay_kimg=(1, 3)).lr_factor(images) for images in (0, 1000, 2000, 3000)] == [1, 1, 0.5, 0]
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
    @pytest.mark.parametrize("classes", [3, 0])
    def test_several_passes_are_the_same_step(self, classes):
        config = replace(CONFIG, batch_norm_group=2, classes=classes)
        whole, parts = (TrainState(config, OptimConfig(), seed=1).to(torch.float64) for _ in range(2))
        for state, micro_batch in ((whole, None), (parts, 2)):
            step = Step(state, BATCH, micro_batch=micro_batch)
            assert step.passes == (4 if micro_batch else 1)
            for _ in range(3):
                pixels, y = real(state.images)
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
    def test_waits_for_nothing(self):
        """No value goes to the host inside a step, but for Adam's step counters, which are on the host here."""
        state = TrainState(CONFIG, OptimConfig(), seed=1)
        step = Step(state, BATCH)
        step([real(0)])
        with torch.profiler.profile() as profile:
            step([real(BATCH)])
        waits = [e for e in profile.events() if e.name == "aten::_local_scalar_dense"]
        outside = [e for e in waits if not _inside(e, "Optimizer.step")]
        assert not outside

    def test_leaks_no_type(self):
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

    def test_keeps_its_inputs(self):
        """Rectifiers and sums work in place; the images they are given are not theirs."""
        state = TrainState(CONFIG, OptimConfig(), seed=1)
        pixels, y = real(0)
        before = pixels.clone()
        Step(state, BATCH)([(pixels, y)])
        assert torch.equal(pixels, before)


def _inside(event, prefix):
    while event is not None:
        if event.name.startswith(prefix):
            return event.name
        event = event.cpu_parent
    return None


def test_unconditional_training():
    state = TrainState(ModelConfig(resolution=32, classes=0, z_dim=8, channels_g=4, channels_d=4), OptimConfig(), 0)
    step = Step(state, BATCH)
    losses = step([real(0)])
    assert losses.isfinite().all()
    assert state.images == BATCH


class TestModel:
    @pytest.fixture
    def state(self):
        state = TrainState(CONFIG, OptimConfig(ema_decay=0.5), seed=1)
        run(state, 2)
        return state

    def test_round_trip_and_repeatable_samples(self, state, tmp_path):
        model = Model.from_state(state, standing_images=256, class_names=["cat", "dog", "owl"])
        model.save(tmp_path)
        loaded = sagan.load(tmp_path)
        images = loaded.sample(["dog", 2], n=5, seed=3)
        assert images.shape == (5, 3, 32, 32)
        assert images.dtype == torch.uint8
        assert torch.equal(images, model.sample(["dog", "owl"], n=5, seed=3))
        assert loaded.labels(["dog", 2], 5).tolist() == [1, 2, 1, 2, 1]
        assert not torch.equal(images, loaded.sample(["dog", 2], n=5, seed=4))

    def test_saved_weights_need_no_spectral_norm(self, state, tmp_path):
        Model.from_state(state, standing_images=64).save(tmp_path)
        from safetensors.torch import load_file

        tensors = load_file(tmp_path / "generator.safetensors")
        assert not any(name.endswith((".u", ".v")) for name in tensors)
        assert torch.linalg.svdvals(tensors["blocks.0.conv2.weight"].flatten(1))[0] < 1.05

    def test_standing_statistics_do_not_depend_on_how_samples_are_batched(self, state):
        model = Model.from_state(state, standing_images=200)
        z, y = latents(0, Purpose.SAMPLE_Z, range(7), 8), torch.tensor([0, 1, 2, 0, 1, 2, 0])
        one_by_one = torch.cat([model.generate(z[i : i + 1], y[i : i + 1]) for i in range(7)])
        # a pixel may round the other way where convolutions sum in another order
        assert (model.generate(z, y).int() - one_by_one.int()).abs().max() <= 1

    def test_raw_and_averaged_weights_differ(self, state):
        raw = Model.from_state(state, weights="raw", standing_images=64).sample(n=3)
        assert not torch.equal(raw, Model.from_state(state, standing_images=64).sample(n=3))

    def test_running_averages_are_the_named_alternative(self, state):
        """After two steps they are mostly their initial values, and a model with them another one."""
        model = Model.from_state(state, standing_images=None)
        for name, tensor in state.generator.state_dict().items():
            if "running" in name:
                assert torch.equal(model.generator.state_dict()[name], tensor)
        assert not torch.equal(model.sample(n=3), Model.from_state(state, standing_images=64).sample(n=3))

    def test_unknown_classes_are_named(self, state):
        model = Model.from_state(state, standing_images=64, class_names=["cat", "dog", "owl"])
        with pytest.raises(ValueError, match="no class 'cow'; there are 3: cat, dog, owl"):
            model.sample(["cow"])

    def test_the_shipped_code_is_enough(self, state, tmp_path):
        """The folder's own copy of the package samples with torch and safetensors alone."""
        Model.from_state(state, standing_images=64).save(tmp_path)
        script = (
            f"import sys; sys.path.insert(0, {str(tmp_path / 'code')!r}); import sagan; "
            f"assert sagan.__file__.startswith({str(tmp_path)!r}); "
            f"print(tuple(sagan.load({str(tmp_path)!r}).sample(n=2).shape), "
            "sorted({'ray', 'mlflow', 'fsspec', 'pydantic', 'pipeline'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "(2, 3, 32, 32) []"


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
