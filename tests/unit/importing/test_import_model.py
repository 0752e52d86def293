"""Generators of other projects become model folders with the same images. Other files are refused by name."""

from __future__ import annotations

import pickle
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import EnvironmentFault, SaganError, UsageError
from pipeline.importing.import_model import import_model
from pipeline.tracking import registry
from pipeline.tracking.mlflow_run import MlflowRun
from pipeline.tracking.open_model import open_model
from sagan.config import ModelConfig
from sagan.generator import Generator
from tests.conftest import TestS3
from tests.unit.importing import peer_files
from tests.unit.importing.peer_files import State

SMALL = ModelConfig(resolution=32, num_classes=3, z_dim=8, channels_g=4, attention=(16,))
BIGGAN = {"weights": "ema", "batch_norm_eps": 1e-5}
MMGENERATION = {"weights": "ema", "batch_norm_eps": 1e-5, "scale_offset": 1, "channel_order": "bgr"}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def images(generator: Generator) -> Tensor:
    """Images of all three classes. Generators without classes ignore the labels."""
    z = torch.randn(4, SMALL.z_dim, generator=torch.Generator().manual_seed(5))
    return generator(z, torch.tensor([0, 1, 2, 1]))


def assert_imported(state: Any, peer: str, given: dict[str, Any], generator: Generator, folder: Path) -> None:
    """Import a state dict and compare the images of the folder with those of the generator."""
    path = folder / "peer.pth"
    torch.save(state, path)
    import_model(str(path), peer, folder / "out", given)
    imported = open_model(str(folder / "out"))
    assert imported.weights == given["weights"]
    assert imported.batch_norm == "running"
    expected = images(generator)
    assert expected.std() > 0.1
    torch.testing.assert_close(images(imported.generator), expected, rtol=0, atol=1e-5)


# --- equal images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({}, {"shared": 5}),
        ({}, {"inside": True}),
        ({}, {"weight": peer_files.plain}),
        ({"attention": ()}, {}),
        ({"attention": (8, 16)}, {}),
        ({"resolution": 64, "channels_g": 8, "multipliers_g": (4, 4, 2, 1, 1), "attention": (32,)}, {}),
    ],
)
def test_biggan_pytorch(changes: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    generator = peer_files.random_generator(replace(SMALL, **changes))
    assert_imported(peer_files.biggan_pytorch(generator, **options), "biggan-pytorch", BIGGAN, generator, tmp_path)


def test_biggan_pytorch_has_its_own_epsilon_in_the_last_batch_norm(tmp_path: Path) -> None:
    generator = peer_files.random_generator(replace(SMALL, batch_norm_eps=0.3))
    state = peer_files.biggan_pytorch(generator)
    generator.norm.eps = 1e-5
    assert_imported(state, "biggan-pytorch", {**BIGGAN, "batch_norm_eps": 0.3}, generator, tmp_path)


def test_sums_of_standing_statistics_are_divided_by_their_count(tmp_path: Path) -> None:
    generator = peer_files.random_generator(SMALL)
    state = peer_files.biggan_pytorch(generator, inside=True)
    for name in state:
        if name.endswith("accumulation_counter"):
            state[name] = torch.full((1,), 16.0)
        elif name.endswith(("stored_mean", "stored_var")):
            state[name] = state[name] * 16
    assert_imported(state, "biggan-pytorch", BIGGAN, generator, tmp_path)


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_mmgeneration(weights: str, tmp_path: Path) -> None:
    """A checkpoint of a run has both kinds of weights and the discriminator."""
    generators = {kind: peer_files.random_generator(SMALL) for kind in ("ema", "raw")}
    prefixes = {"ema": "generator_ema.", "raw": "generator."}
    state = {"discriminator.decision.weight": torch.ones(2)}
    for kind, generator in generators.items():
        state |= {prefixes[kind] + name: tensor for name, tensor in peer_files.mmgeneration(generator).items()}
    checkpoint = {"meta": {"iter": 5, "config": "model = dict()"}, "state_dict": state}
    assert_imported(checkpoint, "mmgeneration", {**MMGENERATION, "weights": weights}, generators[weights], tmp_path)


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"weight": peer_files.biggan_norm, "tables": peer_files.biggan_norm}, {}),
        ({"weight": peer_files.torch_norm, "tables": peer_files.torch_norm}, {}),
        ({"weight": peer_files.plain, "offset": 0}, {"scale_offset": 0}),
        ({"bgr": False}, {"channel_order": "rgb"}),
    ],
)
def test_variants_of_mmgeneration(options: dict[str, Any], given: dict[str, Any], tmp_path: Path) -> None:
    generator = peer_files.random_generator(SMALL)
    state = peer_files.mmgeneration(generator, **options)
    assert_imported(state, "mmgeneration", {**MMGENERATION, **given}, generator, tmp_path)


def test_a_batch_norm_may_have_a_scale_before_its_class_tables(tmp_path: Path) -> None:
    generator = peer_files.random_generator(SMALL)
    state = peer_files.mmgeneration(generator)
    norm = peer_files.first_norm(generator)
    scale, shift = torch.rand(16) + 0.5, torch.randn(16)
    state |= {"conv_blocks.0.norm_1.norm.weight": scale, "conv_blocks.0.norm_1.norm.bias": shift}
    norm.bias.add_(norm.weight * shift)
    norm.weight.mul_(scale)
    assert_imported(state, "mmgeneration", MMGENERATION, generator, tmp_path)


@pytest.mark.parametrize("peer", ["mmgeneration", "studiogan"])
def test_unconditional_generators(peer: str, tmp_path: Path) -> None:
    generator = peer_files.random_generator(replace(SMALL, num_classes=0))
    given = {**MMGENERATION, "scale_offset": None} if peer == "mmgeneration" else {"weights": "raw"}
    generator_of = replace(SMALL, num_classes=0, batch_norm_eps=1e-4)
    if peer == "studiogan":
        generator = peer_files.random_generator(generator_of)
    assert_imported(getattr(peer_files, peer)(generator), peer, given, generator, tmp_path)


@pytest.mark.parametrize("weight", [peer_files.torch_norm, peer_files.plain])
def test_studiogan(weight: Callable[[str, Tensor], State], tmp_path: Path) -> None:
    """Its code adds 1e-4 to variances."""
    generator = peer_files.random_generator(replace(SMALL, batch_norm_eps=1e-4, slope_g=0.1))
    checkpoint = {"state_dict": peer_files.studiogan(generator, weight), "optimizer": {"state": {0: torch.ones(3)}}}
    assert_imported(checkpoint, "studiogan", {"weights": "raw", "slope": 0.1}, generator, tmp_path)


@pytest.mark.parametrize("attention", [(), (32,), (64,)])
def test_official_tf(attention: tuple[int, ...], tmp_path: Path) -> None:
    config = ModelConfig(resolution=128, num_classes=3, z_dim=8, channels_g=4, attention=attention)
    generator = peer_files.random_generator(config)
    save_file(peer_files.official_tf(generator), tmp_path / "variables.safetensors")
    import_model(str(tmp_path / "variables.safetensors"), "official-tf", tmp_path / "out", {})
    torch.testing.assert_close(
        images(open_model(str(tmp_path / "out")).generator), images(generator), rtol=0, atol=1e-5
    )


def test_spectral_norm_is_that_of_the_stored_vectors(tmp_path: Path) -> None:
    """Where they have not converged, the peers divide by less than the spectral norm: torch's by uᵀWv."""
    generator = peer_files.random_generator(replace(SMALL, batch_norm_eps=1e-4))
    state = peer_files.studiogan(generator)
    state["linear0.weight_u"] += 0.3 * torch.randn(256).abs()
    u, v = state["linear0.weight_u"], state["linear0.weight_v"]
    generator.linear.weight.copy_(state["linear0.weight_orig"] / (u @ state["linear0.weight_orig"] @ v))
    assert_imported(state, "studiogan", {"weights": "ema"}, generator, tmp_path)


def test_spectral_norm_is_that_of_one_iteration_from_the_stored_vector(tmp_path: Path) -> None:
    """BigGAN-PyTorch runs one power iteration from u0 in each forward pass."""
    generator = peer_files.random_generator(SMALL)
    state = peer_files.biggan_pytorch(generator)
    u = state["linear.u0"] = torch.randn(1, 256)
    weight = state["linear.weight"]
    v = torch.nn.functional.normalize(u @ weight)
    generator.linear.weight.copy_(weight / (torch.nn.functional.normalize(v @ weight.t()) @ weight @ v.t()))
    assert_imported(state, "biggan-pytorch", BIGGAN, generator, tmp_path)


# --- the folder -------------------------------------------------------------------------------------------------------


def test_the_folder_tells_the_variant_and_the_origin(tmp_path: Path) -> None:
    torch.save(peer_files.biggan_pytorch(peer_files.random_generator(SMALL)), tmp_path / "G_ema.pth")
    import_model(str(tmp_path / "G_ema.pth"), "biggan-pytorch", tmp_path / "out", BIGGAN)
    model = open_model(str(tmp_path / "out"))
    expected = replace(SMALL, channels_d=model.config.channels_d)
    assert model.config == expected
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in ("| imported from | biggan-pytorch |", "| file | G_ema.pth |", "Nobody has scored this model yet"):
        assert fact in card
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert min(picture.size) >= 32


def test_the_command_writes_a_folder_that_can_be_sampled(tmp_path: Path) -> None:
    torch.save(peer_files.biggan_pytorch(peer_files.random_generator(SMALL)), tmp_path / "G.pth")
    out, picture = str(tmp_path / "out"), str(tmp_path / "two.png")
    options = ["--from", "biggan-pytorch", "--weights", "raw", "--batch-norm-eps", "1e-5", "--out", out]
    done = CliRunner().invoke(app, ["import", str(tmp_path / "G.pth"), *options], catch_exceptions=False)
    assert "32 px, 3 classes, attention at: 16" in done.output
    CliRunner().invoke(app, ["sample", out, "--n", "2", "--classes", "2", "--out", picture], catch_exceptions=False)
    with Image.open(picture) as samples:
        assert min(samples.size) >= 32


def test_an_import_replaces_an_earlier_import_and_no_other_folder(tmp_path: Path) -> None:
    torch.save(peer_files.biggan_pytorch(peer_files.random_generator(SMALL)), tmp_path / "G.pth")
    for weights in ("ema", "raw"):
        import_model(str(tmp_path / "G.pth"), "biggan-pytorch", tmp_path / "out", {**BIGGAN, "weights": weights})
        assert open_model(str(tmp_path / "out")).weights == weights
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("text")
    with pytest.raises(UsageError, match="is not empty"):
        import_model(str(tmp_path / "G.pth"), "biggan-pytorch", tmp_path / "mine", BIGGAN)


def test_the_folder_can_be_registered_and_pulled(tmp_path: Path) -> None:
    torch.save(peer_files.biggan_pytorch(peer_files.random_generator(SMALL)), tmp_path / "G.pth")
    import_model(str(tmp_path / "G.pth"), "biggan-pytorch", tmp_path / "out", BIGGAN)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = MlflowRun.start(uri, "imported", "imported", None, {}, {}, str(tmp_path / "artifacts"))
    tracker.close(timeout_s=10)
    registry.register(uri, "imported", tmp_path / "out", tracker.run_id, {"checkpoint_sha256": "0" * 64})
    registry.pull(uri, "models:/imported/1", tmp_path / "pulled")
    imported, pulled = (open_model(str(tmp_path / name)).generator for name in ("out", "pulled"))
    assert images(pulled).equal(images(imported))


def test_files_of_old_versions_of_torch_are_read(tmp_path: Path) -> None:
    generator = peer_files.random_generator(SMALL)
    torch.save(peer_files.biggan_pytorch(generator), tmp_path / "G.pth", _use_new_zipfile_serialization=False)
    import_model(str(tmp_path / "G.pth"), "biggan-pytorch", tmp_path / "out", BIGGAN)
    torch.testing.assert_close(
        images(open_model(str(tmp_path / "out")).generator), images(generator), rtol=0, atol=1e-5
    )


# --- refused ----------------------------------------------------------------------------------------------------------


def refused(
    state: Any, match: str, tmp_path: Path, peer: str = "biggan-pytorch", given: dict[str, Any] = BIGGAN
) -> None:
    torch.save(state, tmp_path / "peer.pth")
    with pytest.raises(UsageError, match=match):
        import_model(str(tmp_path / "peer.pth"), peer, tmp_path / "out", given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("linear.weight", lambda t: t.index_fill(0, torch.tensor([3]), torch.nan), "linear.weight has values that are"),
        ("linear.bias", lambda t: t.int(), "linear.bias is a tensor of torch.int32"),
        ("linear.bias", lambda t: t.to_sparse(), "linear.bias is a tensor"),
        ("linear.bias", lambda t: t[:-1], r"linear.bias has the shape \[255\] instead of \[256\]"),
        ("linear.u0", torch.zeros_like, "the spectral norm of linear is"),
        ("blocks.1.0.conv1.weight", lambda t: t[:, :, :2], r"blocks.1.0.conv1.weight has the shape \[16, 16, 2, 3\]"),
        ("blocks.2.0.conv2.weight", lambda t: t[:5], r"blocks.2.0.conv2.weight has the shape \[5, 16, 3, 3\]"),
        ("blocks.0.0.bn1.stored_var", lambda t: -t, "blocks.0.0.bn1.stored_var has negative values"),
        ("blocks.0.0.bn1.gain.weight", lambda t: t[:2], "norm1.bias would have the shape"),
        ("linear.bias", lambda t: t.double() + 1e300, "linear.bias has values that float32 does not have"),
        ("linear.weight", lambda t: torch.ones(1).expand(2**30, 8), "more bytes than the file"),
        ("linear.weight", lambda t: torch.empty(256, 8, device="meta"), "linear.weight is a tensor"),
        ("output_layer.2.weight", lambda t: None, "its entry 'output_layer.2.weight' is no tensor"),
    ],
)
def test_a_damaged_tensor_is_named(name: str, change: Callable[[Tensor], Any], match: str, tmp_path: Path) -> None:
    state = peer_files.biggan_pytorch(peer_files.random_generator(SMALL))
    refused({**state, name: change(state[name])}, match, tmp_path)


def test_missing_and_unknown_tensors_are_named(tmp_path: Path) -> None:
    state = peer_files.biggan_pytorch(peer_files.random_generator(SMALL))
    refused(
        {**state, "blocks.0.0.conv3.weight": torch.ones(1)},
        "no place for its tensors blocks.0.0.conv3.weight",
        tmp_path,
    )
    del state["blocks.1.0.bn2.bias.weight"]
    refused(state, "has no tensor blocks.1.0.bn2.bias.weight", tmp_path)
    refused(state, "has no tensor linear0.weight", tmp_path, "studiogan", {"weights": "raw"})


def test_structures_that_sagan_does_not_have_are_refused_with_both_values(tmp_path: Path) -> None:
    generator = peer_files.random_generator(SMALL)
    state = peer_files.biggan_pytorch(generator, shared=5)
    hierarchical = torch.randn(16, 5 + 8)
    refused(
        {**state, "blocks.0.0.bn1.gain.weight": hierarchical},
        "takes 13 inputs, and 5 of them are the shared embedding",
        tmp_path,
    )
    two_blocks = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.2.")}
    refused(two_blocks, "model.resolution is 16; it must be one of", tmp_path)
    no_block = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.")}
    refused(no_block, "model.resolution is 4; it must be one of", tmp_path)
    name = "blocks.1.1."
    moved = {key.replace(name, "blocks.2.1."): tensor for key, tensor in state.items()}
    refused(moved, r"model.attention has \[32\]; at 32 px the feature maps have the sizes \[8, 16\]", tmp_path)


@pytest.mark.parametrize(
    ("peer", "given", "match"),
    [
        ("biggan-pytorch", {}, "--weights: .*--batch-norm-eps: "),
        ("mmgeneration", {"weights": "ema"}, "--batch-norm-eps: .*--scale-offset: .*--channel-order: "),
        ("studiogan", {}, "--weights: "),
        (
            "studiogan",
            {"weights": "raw", "batch_norm_eps": 1e-5},
            "--batch-norm-eps is 1e-05, but .* has 0.0001",
        ),
        ("biggan-pytorch", {**BIGGAN, "channel_order": "bgr"}, "--channel-order is bgr, but .* has rgb"),
        ("biggan-pytorch", {**BIGGAN, "weights": "best"}, "--weights is best"),
        ("biggan-pytorch", {**BIGGAN, "batch_norm_eps": float("nan")}, "--batch-norm-eps is nan"),
        ("biggan-pytorch", {**BIGGAN, "batch_norm_eps": 0.0}, "model.batch_norm_eps is 0.0; it must be above 0"),
        ("biggan", BIGGAN, "--from is 'biggan'"),
    ],
)
def test_options_are_asked_for_by_name(peer: str, given: dict[str, Any], match: str, tmp_path: Path) -> None:
    writer = getattr(peer_files, peer.replace("-", "_"), peer_files.biggan_pytorch)
    refused(writer(peer_files.random_generator(SMALL)), f"(?s){match}", tmp_path, peer, given)


def test_the_names_of_a_checkpoint_tell_the_kind_of_weights(tmp_path: Path) -> None:
    state = peer_files.mmgeneration(peer_files.random_generator(SMALL))
    only_raw = {f"generator.{name}": tensor for name, tensor in state.items()}
    refused(only_raw, "--weights is ema, but the file .* has raw", tmp_path, "mmgeneration", MMGENERATION)


class _Program:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_file_runs_code(tmp_path: Path) -> None:
    refused({"linear.weight": _Program(tmp_path / "ran")}, "without running code", tmp_path)
    (tmp_path / "peer.pkl").write_bytes(pickle.dumps(_Program(tmp_path / "ran"), protocol=2))
    with pytest.raises(UsageError, match="without running code"):
        import_model(str(tmp_path / "peer.pkl"), "biggan-pytorch", tmp_path / "out", BIGGAN)
    assert not (tmp_path / "ran").exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    refused([torch.ones(1)], "holds no state dict", tmp_path)
    refused({}, "holds no state dict", tmp_path)
    torch.save({"linear.weight": torch.zeros(10_000)}, tmp_path / "peer.pth")
    with (
        zipfile.ZipFile(tmp_path / "peer.pth") as archive,
        zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as copy,
    ):
        for entry in archive.namelist():
            copy.writestr(entry, archive.read(entry))
    (tmp_path / "text.pth").write_text("no tensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name, match in (
        ("small.pth", "is compressed"),
        ("text.pth", "no file of torch.save"),
        ("text.safetensors", "read"),
    ):
        with pytest.raises(UsageError, match=match):
            import_model(str(tmp_path / name), "biggan-pytorch", tmp_path / "out", BIGGAN)
    with pytest.raises(EnvironmentFault, match="there is no file at"):
        import_model(str(tmp_path / "none.pth"), "biggan-pytorch", tmp_path / "out", BIGGAN)


def test_checkpoints_of_tensorflow_are_refused_with_the_conversion(tmp_path: Path) -> None:
    with pytest.raises(SaganError, match=r"no \.safetensors file") as refusal:
        import_model(str(tmp_path / "model.ckpt-5"), "official-tf", tmp_path / "out", {})
    assert "load_checkpoint" in refusal.value.remedy


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """URL at which the files of the test's folder are served."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


def test_a_remote_file_that_is_missing_or_has_a_query(s3: TestS3, served: str, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="there is no file at"):
        import_model(f"{s3.bucket()}/none.pth", "biggan-pytorch", tmp_path / "out", BIGGAN)
    save_file({"x": torch.zeros(1)}, tmp_path / "G.safetensors")
    with pytest.raises(UsageError, match="linear"):
        import_model(f"{served}/G.safetensors?download=true", "biggan-pytorch", tmp_path / "out", BIGGAN)
