"""Batches reach the simulated GPU without a wait of the host, and evaluation computes there what it computes here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.config.schema import DataSection, PackSection
from pipeline.evaluation.extractors.classifier import Classifier
from pipeline.evaluation.extractors.dinov2 import DinoV2
from pipeline.evaluation.extractors.extractor import Extractor
from pipeline.evaluation.extractors.extractor_file import extractor_from_file
from pipeline.evaluation.extractors.published_networks import IMAGENET, Network, import_torch_fidelity
from pipeline.evaluation.extractors.published_weights import load_published
from pipeline.evaluation.features import Generated, extract
from pipeline.packing.pack import pack
from pipeline.report import attention_maps
from pipeline.streaming.device_transfer import to_device
from pipeline.streaming.stream import Batch, Stream
from sagan import Model, ModelConfig, OptimConfig, TrainState
from sagan.random import Purpose, draw_latents
from sagan.ranks import World
from tests.simulated_gpu import simulated_gpu
from tests.simulated_gpu.simulated_gpu import Record, host
from tests.unit.evaluation.extractors.conftest import inception_file  # noqa: F401
from tests.unit.evaluation.extractors.test_published_networks import holder, random

CONFIG = ModelConfig(resolution=32, num_classes=10, channels_g=4, channels_d=4, z_dim=16, spectral_norm_start="cold")


@pytest.fixture(autouse=True)
def record() -> Iterator[Record]:
    with Record() as record:
        yield record


def pixels(n: int) -> torch.Tensor:
    numbers = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=numbers)
    return images.contiguous(memory_format=torch.channels_last)


def test_a_batch_reaches_the_device_without_a_wait(record: Record) -> None:
    images, labels = to_device(Batch(range(8), pixels(8).pin_memory(), torch.arange(8), 0.0), simulated_gpu.NAME, 3)
    expected, _ = to_device(Batch(range(8), pixels(8), torch.arange(8), 0.0), "cpu", 3)
    assert torch.equal(host(images), expected)
    assert torch.equal(host(labels), torch.arange(8))
    assert not record.syncs
    assert not record.pageable


class Tiny(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = images.to(torch.float32).mean((2, 3)) + torch.ones(3)  # a program names the CPU for the new tensor
        return x, x[:, :2]


def test_a_program_exported_on_a_cpu_runs_on_the_device(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(Tiny(), (pixels(2),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "tiny.pt2")
    ours, theirs = (
        extractor_from_file(str(tmp_path / "tiny.pt2"), 32, device, trusted=True)
        for device in (simulated_gpu.NAME, "cpu")
    )
    for n in (2, 5):
        for found, expected in zip(ours(pixels(n)), theirs(pixels(n)), strict=True):
            assert torch.equal(host(found), expected)


def test_a_stream_reaches_the_device_without_a_wait(tmp_path: Path, record: Record) -> None:
    collection = pack(str(tmp_path / "digits"), PackSection(source="digits", resolution=32, shard_images=500))
    data = DataSection(train=collection.url, cache=str(tmp_path / "cache"))
    with closing(Stream(collection, "train", seed=3, world=World(), data=data)) as stream:
        for _, batch in zip(range(3), stream.batches(0, 16), strict=False):
            images, labels = to_device(batch, simulated_gpu.NAME, 3)
            for found, expected in zip((images, labels), to_device(batch, "cpu", 3), strict=True):
                assert torch.equal(host(found), expected)
    assert not record.syncs
    assert not record.pageable


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Model, TrainState]]:
    """The same model on both devices."""
    with Record():
        states = {device: TrainState(CONFIG, OptimConfig(), 1, device) for device in (simulated_gpu.NAME, "cpu")}
        for state in states.values():
            for network in (state.generator, state.discriminator):
                gammas = [parameter for name, parameter in network.named_parameters() if name.endswith("gamma")]
                assert gammas
                for gamma in gammas:
                    nn.init.ones_(gamma)
        return {device: (Model.from_state(state, standing_images=8), state) for device, state in states.items()}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Classifier(32, 10),
        lambda: Network(DinoV2(32, 2, 2, gated=False), 56, *IMAGENET, resize="fidelity"),
        lambda: Network(DinoV2(32, 2, 2, gated=True), 56, *IMAGENET, resize="clean"),
    ],
    ids=["classifier", "dinov2", "dinov2, gated"],
)
def test_features_are_the_cpus(make: Callable[[], nn.Module], models: dict[str, tuple[Model, TrainState]]) -> None:
    assert_same_features({d: Extractor("", "", random(make()).to(d, torch.float32), device=d) for d in models}, models)


def test_inceptions_features_are_the_cpus(
    inception_file: Path,  # noqa: F811
    models: dict[str, tuple[Model, TrainState]],
) -> None:
    assert_same_features({d: load_published("inception", str(inception_file), device=d) for d in models}, models)


def test_clips_features_are_the_cpus(tmp_path: Path, models: dict[str, tuple[Model, TrainState]]) -> None:
    import_torch_fidelity()
    from torch_fidelity.feature_extractor_clip import CLIPVisual

    tensors = random(CLIPVisual(32, 64, 2, 64, 32)).state_dict() | {"text_projection": torch.zeros(8, 32)}
    torch.jit.script(holder(tensors)).save(path := str(tmp_path / "clip.pt"))
    assert_same_features({d: load_published("clip-vit-b-32", path, device=d) for d in models}, models)


def assert_same_features(extractors: dict[str, Extractor], models: dict[str, tuple[Model, TrainState]]) -> None:
    found, expected = (
        extract(extractors[device], Generated(model, 5, range(2)), range(2), batch=1, keep=True)
        for device, (model, _) in models.items()
    )
    assert found.rows is not None
    assert expected.rows is not None
    assert torch.equal(found.rows, expected.rows)
    assert torch.equal(found.logits, expected.logits)
    assert found.rows.std(0).max() > 0


def test_attention_maps_are_the_cpus(models: dict[str, tuple[Model, TrainState]]) -> None:
    z, y = draw_latents(5, Purpose.SAMPLE_Z, range(2), CONFIG.z_dim), torch.arange(2)
    found, expected = (
        attention_maps.of_generator(model, z, y)
        + attention_maps.of_discriminator(state.discriminator, model.generate(z, y), y)
        for model, state in models.values()
    )
    assert len(found) == len(expected) == 2
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(host(ours.maps), theirs.maps)
        assert (ours.network, ours.gamma) == (theirs.network, theirs.gamma)
