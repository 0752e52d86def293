from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.report import attention_maps
from sagan.attention import SelfAttention
from sagan.config import AttentionForm, ModelConfig, OptimConfig
from sagan.random import Purpose, draw_latents
from sagan.train_state import TrainState
from sagan.trained_model import Model


@torch.no_grad()
def written_out(layer: SelfAttention, x: Tensor) -> Tensor:
    """softmax(θ(x)·φ(x)) of one feature map [C, H, W], key by key: [H, W, K, K]."""
    theta, phi = (torch.einsum("oi,ihw->ohw", conv.kernel[:, :, 0, 0], x) for conv in (layer.theta, layer.phi))
    if layer.pooled:
        phi = torch.stack([phi[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]).amax(0)
    energy = torch.einsum("chw,ckl->hwkl", theta, phi)
    weights = (energy - energy.amax((2, 3), keepdim=True)).exp()
    return weights / weights.sum((2, 3), keepdim=True)


@pytest.mark.parametrize("form", ["released", "icml", "first"])
def test_maps_are_the_softmax_of_both_networks_and_sum_to_one(form: AttentionForm) -> None:
    config = ModelConfig(
        resolution=32, num_classes=3, z_dim=8, channels_g=8, channels_d=8, attention=(8, 16), attention_form=form
    )
    state = TrainState(config, OptimConfig(), seed=0)
    model, seen = Model.from_state(state, standing_images=32), []
    z, y = draw_latents(0, Purpose.SAMPLE_Z, range(2), config.z_dim), torch.tensor([2, 0])
    networks = (model.generator, state.discriminator)
    attentions = [m for network in networks for m in network.modules() if isinstance(m, SelfAttention)]
    for module in attentions:
        module.register_forward_pre_hook(lambda module, given: seen.append((module, given[0].clone())))

    images = model.generate(z, y)
    seen.clear()
    layers = attention_maps.of_generator(model, z, y) + attention_maps.of_discriminator(state.discriminator, images, y)
    found = {(layer.network, layer.queries, layer.keys) for layer in layers}
    keys = {8: 4, 16: 8} if form == "released" else {8: 8, 16: 16}
    assert found == {(network, size, keys[size]) for network in ("generator", "discriminator") for size in (8, 16)}
    inputs = dict(seen)
    for layer, module in zip(layers, attentions, strict=True):
        torch.testing.assert_close(layer.maps.sum((3, 4)), torch.ones(2, layer.queries, layer.queries))
        for i in range(2):
            torch.testing.assert_close(layer.maps[i], written_out(module, inputs[module][i]), rtol=1e-4, atol=1e-6)


def pointing(pooled: bool) -> tuple[nn.Module, Tensor]:
    """A layer and its feature map [1, 8, 8, 8] in which the place (1, 6) attends to (5, 2), all others evenly."""
    layer = SelfAttention(8, None, "released" if pooled else "icml")
    x = torch.zeros(1, 8, 8, 8)
    x[0, 0, 1, 6] = 50.0  # a query
    x[0, 1, 5, 2] = 1.0  # a key
    with torch.no_grad():
        for conv, channel in ((layer.theta, 0), (layer.phi, 1)):
            conv.weight.zero_()
            conv.weight[0, 0, 0, channel] = 1.0
    return layer, x


@pytest.mark.parametrize("pooled", [True, False])
def test_a_pattern_made_by_hand_shows_at_its_pixels(pooled: bool) -> None:
    layer, x = pointing(pooled)
    (recorded,) = attention_maps.record_layers("generator", layer, x)
    image = torch.full((3, 32, 32), 100, dtype=torch.uint8)
    shown = attention_maps.overlaid(image, recorded.maps[0, 1, 6], (255, 0, 0))
    lit = torch.zeros(32, 32, dtype=torch.bool)
    if pooled:
        lit[16:24, 8:16] = True  # cell (2, 1) of 4×4, in which the key lies
    else:
        lit[20:24, 8:12] = True  # cell (5, 2) of 8×8
    assert torch.equal(shown[0] > 200, lit)
    assert (shown[:, ~lit] == 60).all()
    even = attention_maps.overlaid(image, recorded.maps[0, 6, 1], (255, 0, 0))
    assert len(even.flatten(1).unique(dim=1).T) == 1

    page = np.asarray(attention_maps.picture(image, recorded.maps[0], [(1 / 8, 6 / 8)]))
    side = attention_maps.PANEL
    assert page.shape == (side, 2 * side + attention_maps.GAP, 3)
    red = (page == attention_maps.COLOURS[0]).all(2)
    point = Image.fromarray(red[:, :side]).getbbox()
    assert point == (6 * 16 + 1, 1 * 16 + 1, 7 * 16 - 1, 2 * 16 - 1)  # inside its white outline


def test_few_cells_hold_what_many_held() -> None:
    maps = torch.rand(2, 64, 64, 32, 32).flatten(3).softmax(-1).unflatten(3, (32, 32))
    few = attention_maps.coarse(maps)
    assert few.shape == (2, 32, 32, 16, 16)
    torch.testing.assert_close(few.sum((3, 4)), torch.ones(2, 32, 32))
    torch.testing.assert_close(few[1, 3, 7, 2, 5], maps[1, 6:8, 14:16, 4:6, 10:12].sum((2, 3)).mean())
    small = maps[:, :8, :8, :4, :4]
    assert torch.equal(attention_maps.coarse(small), small)


def test_shares_come_back_from_a_byte() -> None:
    maps = torch.randn(1, 8, 8, 64).mul(3).softmax(-1).unflatten(3, (8, 8))
    maps[0, 0, 0] = torch.eye(8) / 8
    times = 2 ** ((attention_maps.quantised(maps).double() - attention_maps.EVEN) / attention_maps.DOUBLING)
    wanted = (maps * 64).double().clamp(min=1 / 8)
    torch.testing.assert_close(times, wanted, rtol=0.016, atol=0)
    sharpest = torch.zeros(1, 1, 1, 16, 16)
    sharpest[..., 3, 4] = 1
    assert attention_maps.quantised(sharpest).max() <= 255
    assert attention_maps.quantised(sharpest).flatten().topk(2).values.tolist() == [253, 0]
