"""DiffAugment changes images as its paper says, and both updates of a step give its images to the discriminator."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from sagan import OptimConfig, Step, TrainState
from sagan.diffaugment import augment, draw_parameters
from sagan.random import Purpose
from sagan.ranks import World
from tests.unit.sagan.float64 import EXACT, rand
from tests.unit.sagan.training import ACGAN, BATCH, CONFIG, real, run, same

SIZE = 16
NONE = [0.0, 1.0, 1.0, 0, 0, SIZE, SIZE]  # the cutout is outside the image


def plain(image, brightness, saturation, contrast, down, right, top, left):
    """Change one image [3, size, size] pixel by pixel."""
    size = image.shape[-1]
    x = image.numpy() + brightness
    x = np.stack([[saturation * (x[c] - sum(x) / 3) + sum(x) / 3] for c in range(3)])[:, 0]
    x = contrast * (x - x.sum() / x.size) + x.sum() / x.size
    changed = np.zeros_like(x)
    for row in range(size):
        for column in range(size):
            source = (row + int(down), column + int(right))
            is_cut = top <= row < top + size // 2 and left <= column < left + size // 2
            if all(0 <= place < size for place in source) and not is_cut:
                changed[:, row, column] = x[:, source[0], source[1]]
    return torch.from_numpy(changed)


def parameters(images, size=SIZE):
    return draw_parameters(3, Purpose.AUGMENT_REAL, range(images), size)


EXTREMES = [
    [-0.5, 0.0, 0.5, -SIZE // 8, SIZE // 8, -SIZE // 4, -SIZE // 4],
    [0.5, 2.0, 1.5, SIZE // 8, -SIZE // 8, 3 * SIZE // 4, 3 * SIZE // 4],
    NONE,
]


@pytest.mark.parametrize("given_", [parameters(20), torch.tensor(EXTREMES)], ids=["drawn", "extremes"])
def test_images_change_as_pixel_by_pixel(given_):
    images, given_ = rand(len(given_), 3, SIZE, SIZE), given_.double()
    expected = [plain(image, *row.tolist()) for image, row in zip(images, given_, strict=True)]
    torch.testing.assert_close(augment(images, given_), torch.stack(expected), **EXACT)


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        (0, 0.5, lambda x: x + 0.5),
        (1, 0.0, lambda x: x.mean(1, keepdim=True).expand(-1, 3, -1, -1)),
        (2, 0.5, lambda x: (x + x.mean()) / 2),
        (3, 2, lambda x: torch.cat([x[:, :, 2:], torch.zeros_like(x[:, :, :2])], dim=2)),
        (4, -2, lambda x: torch.cat([torch.zeros_like(x[..., :2]), x[..., :-2]], dim=3)),
    ],
    ids=["brightness", "saturation", "contrast", "down", "right"],
)
def test_one_change_alone(column, value, expected):
    x = rand(1, 3, SIZE, SIZE)
    row = torch.tensor([NONE], dtype=torch.float64)
    torch.testing.assert_close(augment(x, row), x, **EXACT)
    row[0, column] = value
    torch.testing.assert_close(augment(x, row), expected(x), **EXACT)


def test_a_cutout_is_a_quarter_of_the_image():
    row = torch.tensor([[*NONE[:5], 3, 5]], dtype=torch.float64)
    expected = torch.ones(1, 3, SIZE, SIZE, dtype=torch.float64)
    expected[..., 3 : 3 + SIZE // 2, 5 : 5 + SIZE // 2] = 0
    assert torch.equal(augment(torch.ones_like(expected), row), expected)


def test_gradients_pass_through_every_change():
    row = torch.tensor([[0.2, 1.4, 0.7, -1, 1, 2, -1], [-0.1, 0.3, 1.3, 1, 0, 5, 4]], dtype=torch.float64)
    assert gradcheck(lambda x: augment(x, row), rand(2, 3, 8, 8, grad=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_rounded_once_at_the_end(autocast):
    images, given_ = torch.randn(8, 3, SIZE, SIZE).bfloat16(), parameters(8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        changed = augment(images, given_)
    assert changed.dtype == torch.bfloat16
    assert torch.equal(changed, augment(images.float(), given_).bfloat16())
    exact = augment(images.double(), given_.double())
    torch.testing.assert_close(augment(images.float(), given_).double(), exact, rtol=1e-5, atol=1e-5)


# --- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 256])
def test_parameters_have_the_ranges_of_the_official_code(size):
    """Every whole number occurs equally often: to 5 standard deviations of 200 000 draws."""
    images = 200_000
    drawn = parameters(images, size)
    for column, (low, high) in enumerate([(-0.5, 0.5), (0, 2), (0.5, 1.5)]):
        assert low <= drawn[:, column].min() < low + 1e-3
        assert high - 1e-3 < drawn[:, column].max() <= high
        assert abs(drawn[:, column].double().mean() - (low + high) / 2) < 5 * (high - low) / (12 * images) ** 0.5
    for column, first, count in [
        *((c, -size // 8, size // 4 + 1) for c in (3, 4)),
        *((c, -size // 4, size + 1) for c in (5, 6)),
    ]:
        numbers = drawn[:, column].long()
        assert torch.equal(numbers.float(), drawn[:, column])
        occurrences = (numbers - first).bincount(minlength=count)
        assert len(occurrences) == count
        assert (occurrences - images / count).abs().max() < 5 * (images / count) ** 0.5


@given(start=st.integers(0, 10**10), images=st.integers(1, 40), size=st.integers(1, 8))
def test_ranks_together_draw_what_one_process_draws(start, images, size):
    whole = draw_parameters(0, Purpose.AUGMENT_D, range(start, start + images), 32)
    for rank in range(size):
        share = World(rank, size).share(start, start + images)
        mine = draw_parameters(0, Purpose.AUGMENT_D, share, 32)
        assert torch.equal(mine, whole[[p - start for p in share]])


def test_the_parameters_are_those_of_every_earlier_version():
    """Part of the format of a run: a changed value would make resumed runs differ."""
    row = draw_parameters(7, Purpose.AUGMENT_REAL, range(5, 6), 32)[0]
    assert [f"{v:.6f}" for v in row[:3].tolist()] == ["0.117620", "0.099665", "0.652626"]
    assert row[3:].tolist() == [4, 0, 2, 11]


# --- steps -----------------------------------------------------------------------------------------------------------


def test_every_update_gives_the_discriminator_changed_images():
    """In each update, real and generated images have parameters of their own, at the position of the update."""
    state = TrainState(CONFIG, OptimConfig(n_dis=2), seed=1)
    generated, received = [], []
    state.generator.register_forward_hook(lambda _, __, images: generated.append(images.detach()))
    state.discriminator.register_forward_pre_hook(lambda _, inputs: received.append(inputs[0].detach()))
    step = Step(state, BATCH, augment="diffaugment")
    step([real(0), real(BATCH)])
    batches = [real(2 * BATCH), real(3 * BATCH)]
    del generated[:], received[:]
    step(batches)

    def require_same(got, want):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)  # means of another memory format

    def changed(images, purpose, start):
        return augment(images, draw_parameters(1, purpose, range(start, start + BATCH), 32))

    for update, start in enumerate((2 * BATCH, 3 * BATCH)):
        theirs = changed(batches[update][0], Purpose.AUGMENT_REAL, start)
        ours = changed(generated[update], Purpose.AUGMENT_D, start)
        require_same(received[update], torch.cat([theirs, ours]))
    require_same(received[2], changed(generated[2], Purpose.AUGMENT_G, 2 * BATCH))
    assert len(received) == 3


@pytest.mark.parametrize(
    ("model", "optim"),
    [
        pytest.param({}, {}, id="hinge, projection"),
        pytest.param({"num_classes": 0}, {"loss": "bce"}, id="cross-entropy, no classes"),
        pytest.param({"condition_d": "classifier"}, {}, id="AC-GAN"),
        pytest.param({"architecture": "dcgan"}, {"loss": "bce"}, id="DCGAN"),
        pytest.param(ACGAN, {"loss": "bce"}, id="AC-GAN of 2017"),
    ],
)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_resumed_run_equals_the_uninterrupted_one(model, optim, precision, tmp_path):
    config, rates = replace(CONFIG, **model), OptimConfig(**optim)
    options = {"augment": "diffaugment", "precision": precision}
    whole, first, without = (TrainState(config, rates, seed=1) for _ in range(3))
    losses = run(whole, 3, **options)
    run(first, 1, **options)
    first.save(tmp_path)
    second = TrainState.load(tmp_path)
    assert run(second, 2, **options) == losses[1:]
    assert same(whole, second)
    assert np.isfinite(losses).all()
    run(without, 3, precision=precision)
    assert not same(whole, without)


def test_another_augmentation_is_refused():
    with pytest.raises(ValueError, match=r"augment is 'flip'; it must be None or one of \('diffaugment',\)"):
        Step(TrainState(CONFIG, OptimConfig(), seed=1), BATCH, augment="flip")
