"""A warm start takes the tensors of a source bit for bit, converts tables of classes, and refuses other layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from sagan import Model, ModelConfig, OptimConfig, TrainState
from sagan.random import Purpose, draw_latents
from sagan.warm_start import Choice, Source, WarmStart, tensors_of
from tests.unit.sagan.training import ACGAN, CONFIG, run, same

NAMES = ["ant", "bee", "cow"]
OTHERS = ["bee", "dog", "ant", "elk"]
OPTIM = OptimConfig(ema_decay=0.9)
EVERYTHING = Choice(optimizers=True, ema=True)


def trained(model: ModelConfig = CONFIG) -> TrainState:
    state = TrainState(model, OPTIM, seed=1)
    run(state, 2)
    return state


@pytest.fixture(scope="module")
def earlier() -> TrainState:
    return trained()


def source_of(state: TrainState, names: Sequence[str] = NAMES) -> Source:
    return Source(state.model, names, images=state.images)


def start(
    state: TrainState,
    choice: Choice = EVERYTHING,
    names: Sequence[str] = NAMES,
    optim: OptimConfig = OPTIM,
    **model: Any,
) -> tuple[TrainState, WarmStart]:
    """A state with `model` in place of values of the source's configuration, and the plan that it follows."""
    plan = WarmStart.plan(source_of(state), replace(state.model, **model), optim, names, choice)
    return plan.state(tensors_of(state), seed=5), plan


def tensors(state: TrainState, *prefixes: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.tensors() if name.startswith(prefixes)}


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- the same classes ------------------------------------------------------------------------------------------------


def test_a_state_of_the_same_model_has_every_tensor_of_the_source_and_a_position_of_its_own(earlier):
    new, plan = start(earlier)
    assert same(new, earlier)
    assert (new.images, new.seed, earlier.images > 0) == (0, 5, True)
    assert "moving average" in plan.taken
    assert "moments of Adam: generator and discriminator" in plan.taken


def test_without_moments_the_optimisers_are_new_and_the_networks_are_not(earlier):
    new, plan = start(earlier, Choice())
    assert equal(dict(new.tensors()), tensors(earlier, "generator.", "discriminator.", "ema."))
    assert "moments of Adam: new" in plan.skipped


def test_a_state_at_the_position_of_its_source_goes_on_as_the_source_does(earlier):
    optim = replace(OPTIM, ema_start_kimg=earlier.images / 1000)
    choice = Choice(optimizers=True, keep_position=True)
    new, plan = start(earlier, choice, optim=optim)
    assert same(new, earlier)
    assert new.images == plan.images == earlier.images > 0
    assert {"moving average", f"position: {earlier.images / 1000:g} kimg"} <= set(plan.taken)
    assert not any("position" in line for line in plan.skipped)
    late, plan = start(earlier, choice, optim=replace(OPTIM, ema_start_kimg=1.0))
    assert not plan.ema, "the moving average is still a copy of the weights there"
    assert late.images == earlier.images
    plan = WarmStart.plan(source_of(earlier), earlier.model, OPTIM, NAMES, choice)
    assert run(plan.state(tensors_of(earlier), earlier.seed), 2) == run(trained(), 2), "as the source with its seed"
    faster, _ = start(earlier, choice, optim=replace(OPTIM, lr_d=1e-2))
    assert same(faster, earlier), "only the steps differ"


@pytest.mark.parametrize(
    ("choice", "optim"), [(Choice(ema=False), OPTIM), (Choice(), replace(OPTIM, ema_start_kimg=1.0))]
)
def test_a_moving_average_that_is_not_taken_begins_as_the_weights(earlier, choice, optim):
    new, plan = start(earlier, choice, optim=optim)
    assert all(torch.equal(new.ema[name], weight) for name, weight in new.generator.named_parameters())
    assert not equal(tensors(new, "ema."), tensors(earlier, "ema."))
    assert any(line.startswith("moving average: it starts as a copy") for line in plan.skipped)


@pytest.mark.parametrize(("network", "other"), [("generator", "discriminator"), ("discriminator", "generator")])
def test_the_network_that_is_not_taken_has_the_new_weights_of_its_seed(earlier, network, other):
    new, plan = start(earlier, Choice(network, optimizers=True))
    fresh = TrainState(CONFIG, OPTIM, seed=5)
    assert equal(tensors(new, f"{network}."), tensors(earlier, f"{network}."))
    assert equal(tensors(new, f"{other}."), tensors(fresh, f"{other}."))
    assert equal(tensors(new, "adam_"), tensors(earlier, f"adam_{network[0]}"))
    assert f"{other}: not asked for; its weights are new" in plan.skipped


def test_classes_without_names_are_the_same_where_their_numbers_are(earlier):
    assert same(start(earlier, names=[])[0], earlier)


# --- other classes ---------------------------------------------------------------------------------------------------


def is_table(name: str) -> bool:
    return "norm1." in name or "norm2." in name or "embedding." in name or "classifier." in name


def parameters(state: TrainState) -> dict[str, torch.Tensor]:
    """Every parameter, moving average and moment, without statistics, vectors and numbers of steps."""
    ends = ("weight", "bias", "gamma", "exp_avg", "exp_avg_sq")
    return {name: tensor for name, tensor in state.tensors() if name.endswith(ends)}


# Conditional batch norm has 12 tables. A table of the generator has an average and two moments, and a table of the
# discriminator has two moments. The generator of the first AC-GAN has one table.
@pytest.mark.parametrize(
    ("differs", "expected_tables"),
    [({}, 12 * 4 + 3), ({"condition_d": "classifier"}, 12 * 4 + 3 * 2), (ACGAN, 4 + 3 * 2)],
)
def test_a_class_has_the_row_of_its_name_or_the_mean_row(differs, expected_tables):
    state = trained(replace(CONFIG, **differs))
    new, plan = start(state, names=OTHERS, num_classes=4)
    old = parameters(state)
    tables = 0
    for name, tensor in parameters(new).items():
        if is_table(name):
            tables += 1
            mean = old[name].double().mean(0).to(tensor.dtype)
            for row, expected in zip(tensor, (old[name][1], mean, old[name][0], mean), strict=True):
                assert torch.equal(row, expected), name
        else:
            assert torch.equal(tensor, old[name]), name
    assert tables == expected_tables
    (row,) = [line for line in plan.taken if line.startswith("discriminator") and "tables" in line]
    assert "the row of the same name for bee, ant, and the mean of the 3 rows for dog, elk" in row
    assert "classes that only the source has: cow" in plan.skipped


def test_classes_in_another_order_keep_their_rows(earlier):
    new, _ = start(earlier, names=["cow", "ant", "bee"])
    for name in ("generator.blocks.0.norm1.weight", "ema.blocks.0.norm1.bias", "discriminator.embedding.weight"):
        assert torch.equal(dict(new.tensors())[name], dict(earlier.tensors())[name][[2, 0, 1]])


def test_a_new_table_is_divided_by_its_own_norm(earlier):
    new, _ = start(earlier, names=OTHERS, num_classes=4)
    embedding, before = new.discriminator.embedding, earlier.discriminator.embedding
    assert embedding.sigma.item() == pytest.approx(torch.linalg.matrix_norm(embedding.weight, 2).item(), rel=1e-3)
    assert not torch.equal(embedding.sigma, before.sigma)


def test_a_model_without_classes_begins_with_the_mean_rows(earlier):
    new, plan = start(earlier, num_classes=0, names=[])
    norm, before = new.generator.blocks[0].norm1, earlier.generator.blocks[0].norm1
    assert torch.equal(norm.weight, before.weight.double().mean(0).float())
    assert "discriminator: embedding.weight of the source: the network has no classes" in plan.skipped
    assert any("the mean of the 3 rows for all images" in line for line in plan.taken)
    assert len(run(new, 1)) == 1


def test_classes_of_a_source_without_classes_begin_equal():
    state = trained(replace(CONFIG, num_classes=0))
    plan = WarmStart.plan(source_of(state, []), replace(CONFIG, num_classes=2), OPTIM, ["a", "b"], EVERYTHING)
    new = plan.state(tensors_of(state), seed=5)
    for name, tensor in parameters(new).items():
        if "norm1." in name or "norm2." in name:
            assert all(torch.equal(row, parameters(state)[name]) for row in tensor)
    assert "discriminator: embedding.weight: new, because the source has none" in plan.skipped
    fresh = TrainState(replace(CONFIG, num_classes=2), OPTIM, seed=5)
    assert torch.equal(new.discriminator.embedding.weight, fresh.discriminator.embedding.weight)


@pytest.mark.parametrize("count", [0, 4])
def test_a_state_with_other_classes_is_the_same_each_time_and_resumes_bit_for_bit(earlier, count, tmp_path):
    names = OTHERS[:count]
    first, second = (start(earlier, num_classes=count, names=names)[0] for _ in range(2))
    assert same(first, second), "every machine computes the same state"
    first.save(tmp_path)
    loaded = TrainState.load(tmp_path)
    assert same(loaded, second)
    assert run(loaded, 2) == run(second, 2)


# --- a finished generator --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(earlier) -> Model:
    return Model.from_state(earlier, standing_images=64, class_names=NAMES)


@pytest.mark.parametrize("norm", [True, False])
def test_a_finished_generator_generates_the_same_images_as_before(finished, norm):
    source = Source(finished.config, finished.class_names, finished=True)
    plan = WarmStart.plan(source, replace(CONFIG, spectral_norm_g=norm), OPTIM, NAMES, Choice())
    new = plan.state(tensors_of(finished), seed=5)
    z, y = draw_latents(0, Purpose.SAMPLE_Z, range(8), CONFIG.z_dim), torch.arange(8) % 3
    with torch.no_grad():  # the σ by which the source was divided has an error of about 0.2 %
        torch.testing.assert_close(new.generator(z, y), finished.generator(z, y), rtol=0, atol=1e-2 if norm else 1e-6)
    assert plan.networks == ("generator",)
    assert all(torch.equal(new.ema[name], weight) for name, weight in new.generator.named_parameters())
    assert "discriminator: the source has none; its weights are new" in plan.skipped


def test_gradients_through_the_power_iteration_need_a_vector_that_the_source_may_lack(earlier):
    new, _ = start(earlier, spectral_norm_gradient="through")
    layer = new.generator.linear
    assert layer.sigma.item() == pytest.approx(torch.linalg.matrix_norm(layer.matrix, 2).item(), rel=1e-2)
    assert torch.isfinite(torch.tensor(run(new, 1))).all()


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "key", "theirs", "ours"),
    [
        ({"resolution": 64, "attention": ()}, "model.resolution", "32", "64"),
        ({"architecture": "dcgan"}, "model.architecture", "resnet", "dcgan"),
        ({"channels_g": 8}, "model.channels_g times", "[16, 16, 16, 16]", "[32, 32, 32, 32]"),
        ({"channels_d": 8}, "model.channels_d times", "[8, 8, 8, 8]", "[16, 16, 16, 16]"),
        ({"z_dim": 16}, "model.z_dim", "8", "16"),
        ({"attention": (8,)}, "model.attention", "[16]", "[8]"),
        ({"attention_form": "icml"}, "model.attention_form", "released", "icml"),
        ({"slope_d": 0.2}, "model.slope_d", "0.0", "0.2"),
        ({"spectral_norm_g": False}, "model.spectral_norm_g", "True", "False"),
        ({"condition_d": "classifier"}, "model.condition_d", "projection", "classifier"),
    ],
)
def test_other_layers_are_refused_with_both_values(model, key, theirs, ours):
    source = Source(CONFIG, NAMES, images=8)
    with pytest.raises(ValueError, match=key) as caught:
        WarmStart.plan(source, replace(CONFIG, **model), OPTIM, NAMES, Choice())
    assert f": {theirs} in the source, {ours} here" in str(caught.value)


def test_a_discriminator_that_is_not_taken_may_differ():
    source = Source(CONFIG, NAMES, images=8)
    plan = WarmStart.plan(source, replace(CONFIG, channels_d=8), OPTIM, NAMES, Choice("generator"))
    assert plan.networks == ("generator",)


@pytest.mark.parametrize(
    ("source", "choice", "optim", "problem"),
    [
        (Source(CONFIG, NAMES, finished=True), Choice("discriminator"), OPTIM, "has no discriminator"),
        (Source(CONFIG, NAMES, finished=True), Choice(optimizers=True), OPTIM, "no moments of Adam"),
        (Source(CONFIG, NAMES), Choice(optimizers=True), OPTIM, "no moments of Adam"),
        (Source(CONFIG, NAMES, finished=True), Choice(ema=True), OPTIM, "no moving average"),
        (Source(CONFIG, NAMES, images=8), Choice("discriminator", ema=True), OPTIM, "no moving average"),
        (Source(CONFIG, NAMES, images=8), Choice(ema=True), replace(OPTIM, ema_start_kimg=2.0), "ema_start_kimg is 2"),
        (Source(CONFIG, NAMES), Choice(keep_position=True), OPTIM, "the source has no position"),
        (Source(CONFIG, NAMES, finished=True), Choice(keep_position=True), OPTIM, "the source has no position"),
    ],
)
def test_what_the_source_does_not_have_is_refused(source, choice, optim, problem):
    with pytest.raises(ValueError, match=problem):
        WarmStart.plan(source, CONFIG, optim, NAMES, choice)
