"""A state is everything a step reads and changes: saved, moved and resumed it goes on bit for bit."""

import subprocess
import sys

import pytest
import torch

import sagan
from sagan import Model, ModelConfig, OptimConfig, Step, TrainState
from sagan.random import Purpose, labels, latents

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
    facts.write_text(facts.read_text().replace('"format": 1', '"format": 99'))
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
    torch.testing.assert_close(torch.tensor(got), torch.tensor(GOLDEN), rtol=1e-6, atol=1e-6)


def test_bf16_stays_near_float32():
    """bfloat16 has 8 bits: first losses agree to a few per cent, and nothing in the state changes its type."""
    exact, autocast = TrainState(CONFIG, OptimConfig(), seed=2), TrainState(CONFIG, OptimConfig(), seed=2)
    want, got = run(exact, 1)[0], run(autocast, 1, precision="bf16")[0]
    assert got == pytest.approx(want, rel=0.05, abs=0.05)
    assert {t.dtype for _, t in autocast.tensors()} == {torch.float32}


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
        assert torch.linalg.svdvals(tensors["blocks.0.conv1.weight"].flatten(1))[0] < 1.05

    def test_standing_statistics_do_not_depend_on_how_samples_are_batched(self, state):
        model = Model.from_state(state, standing_images=200)
        z, y = latents(0, Purpose.SAMPLE_Z, range(7), 8), torch.tensor([0, 1, 2, 0, 1, 2, 0])
        one_by_one = torch.cat([model.generate(z[i : i + 1], y[i : i + 1]) for i in range(7)])
        # a pixel may round the other way where convolutions sum in another order
        assert (model.generate(z, y).int() - one_by_one.int()).abs().max() <= 1

    def test_raw_and_averaged_weights_differ(self, state):
        raw = Model.from_state(state, weights="raw", standing_images=64).sample(n=3)
        assert not torch.equal(raw, Model.from_state(state, standing_images=64).sample(n=3))

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
    [1.9614545274096984, -3.5032525283144555],
    [2.615049933237239, -1.1653333032496833],
    [2.616497794024134, -0.9535624460340801],
    [1.140886204102073, -1.4198533351536176],
    [1.795815081225292, -0.40926324564974553],
    [2.205329417370306, 0.049574330780558784],
    [1.0161539225481273, 0.8834985988645521],
    [0.840178021339343, 1.5051291677268788],
    [0.5819252396038447, 1.2658123622216695],
    [0.1089915456460504, 1.5413907998158405],
]
