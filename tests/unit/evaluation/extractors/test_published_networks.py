from __future__ import annotations

import hashlib
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.errors import CorruptError, EnvironmentFault, UsageError
from pipeline.evaluation.extractors import published_networks
from pipeline.evaluation.extractors.dinov2 import DinoV2, dinov2
from pipeline.evaluation.extractors.extractor import Extractor
from pipeline.evaluation.extractors.published_weights import load_published
from pipeline.evaluation.frechet_distance import Moments, frechet_distance
from pipeline.evaluation.metrics import FRECHET_DISTANCE

M = TypeVar("M", bound=torch.nn.Module)


def images(n: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_inception_under_other_weights_is_never_called_fid(inception_file: Path) -> None:
    extractor = load_published("inception", str(inception_file))
    digest = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    assert extractor.digest == digest
    assert FRECHET_DISTANCE.name_under(extractor) == f"fid_inception_{digest[:8]}"


def test_inception_features_and_distance_are_torch_fidelitys(inception_file: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    ours = load_published("inception", str(inception_file))
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_file)
    )
    a, logits = ours(images(6))
    b, _ = ours(images(5, size=128, seed=1))
    for mine, its in zip((a, logits), theirs(images(6)), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=0)
    assert (a.shape, logits.shape, a.dtype) == ((6, 2048), (6, 1008), torch.float32)
    a, b = a[:, :256], b[:, :256]  # eigenvalues of all 2 048 take seconds and show nothing more
    statistics = [fid_features_to_statistics(x.double()) for x in (a, b)]
    reference = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    traces = sum(float(s["sigma"].trace()) for s in statistics)
    assert traces > 0
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(reference, abs=1e-6 * traces)


@pytest.mark.parametrize("size", [32, 128, 512])
def test_the_clean_resize_is_pillows_on_float_channels(size: int) -> None:
    pixels = images(2, size)
    resized, _ = published_networks.Network(torch.nn.Identity(), 299, [0.0] * 3, [1.0] * 3, resize="clean")(pixels)

    def by_pillow(channel: torch.Tensor) -> torch.Tensor:
        image = Image.fromarray(channel.numpy().astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image).clip(0, 255))

    expected = torch.stack([torch.stack([by_pillow(channel) for channel in image]) for image in pixels])
    torch.testing.assert_close(resized.float(), expected, rtol=0, atol=1e-4)  # Pillow rounds to float32 in between


def test_a_resize_has_its_own_features_but_where_nothing_is_to_resize(inception_file: Path) -> None:
    usual = load_published("inception", str(inception_file))
    clean = load_published("inception", str(inception_file), resize="clean")
    assert (usual.resize, clean.resize) == ("tf1-bilinear-299", "clean-bicubic-299")
    assert FRECHET_DISTANCE.name_under(clean) == f"{FRECHET_DISTANCE.name_under(usual)}_clean"
    small, large = images(1), images(1, size=299)
    assert not torch.allclose(usual(small)[0], clean(small)[0], rtol=1e-2)
    torch.testing.assert_close(usual(large)[0], clean(large)[0])


def test_float64_is_computed_in_float64(inception_file: Path) -> None:
    double = load_published("inception", str(inception_file), dtype="float64")
    single = load_published("inception", str(inception_file))
    features, logits = double(images(1))
    assert features.dtype == logits.dtype == torch.float64
    assert not torch.equal(features, features.float().double())
    scale = float(features.abs().max())
    torch.testing.assert_close(single(images(1))[0].double(), features, rtol=0, atol=1e-4 * scale)


def test_an_unknown_name_is_refused_with_all_known_ones() -> None:
    with pytest.raises(UsageError, match="no extractor 'inceptoin'") as caught:
        load_published("inceptoin", None)
    for name in ("inception", "vgg16", "clip-vit-b-32", "dinov2-vit-g-14", "classifier", ".pt2"):
        assert name in caught.value.remedy


# --- torch-fidelity's other networks, with random weights ------------------------------------------------------------


def test_vgg16_is_torch_fidelitys(tmp_path: Path) -> None:
    from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16
    from torchvision.models import vgg16  # type: ignore[import-untyped]

    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in vgg16().state_dict().items()}
    torch.save({key: overlapping(shape) for key, shape in shapes.items()}, tmp_path / "vgg16.pth")
    ours = load_published("vgg16", str(tmp_path / "vgg16.pth"))
    theirs = FeatureExtractorVGG16("vgg16", ["fc2_relu"], feature_extractor_weights_path=str(tmp_path / "vgg16.pth"))
    assert_same_without_logits(ours, theirs, features=4096)
    assert ours.resize == "tf1-bilinear-224"


@pytest.mark.parametrize("kind", ["vit", "rn"])
def test_clip_is_torch_fidelitys(kind: str, tmp_path: Path) -> None:
    published_networks.import_torch_fidelity()
    from torch_fidelity.feature_extractor_clip import CLIPVisual, FeatureExtractorCLIP

    layers: int | tuple[int, ...] = 2 if kind == "vit" else (1, 1, 1, 1)
    tensors = random(CLIPVisual(32, 64, layers, 64, 32)).state_dict() | {"text_projection": torch.zeros(8, 32)}
    path = str(tmp_path / "clip.pt")
    torch.jit.script(holder(tensors)).save(path)
    ours, theirs = load_published("clip-vit-b-32", path), FeatureExtractorCLIP("clip-vit-b-32", ["clip"], path)
    assert_same_without_logits(ours, theirs, features=32)
    assert ours.resize == "tf1-bilinear-64"


def test_dinov2_is_read_and_normalised_as_torch_fidelity_does(tmp_path: Path) -> None:
    from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

    class Here(FeatureExtractorDinoV2):
        def __init__(self, model: torch.nn.Module) -> None:
            torch.nn.Module.__init__(self)
            self.model, self.features_list, self.feature_extractor_internal_dtype = model, ["dinov2"], torch.float32

    model = random(dinov2("dinov2-vit-s-14"))
    torch.save(model.state_dict() | {"mask_token": torch.zeros(1, 384)}, tmp_path / "s.pth")
    ours = load_published("dinov2-vit-s-14", str(tmp_path / "s.pth"))
    assert_same_without_logits(ours, Here(model), features=384)


def test_dinov2_is_a_transformer_of_torch_with_scaled_branches() -> None:
    model = random(DinoV2(64, 2, 4, gated=False)).double()
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for block in model.blocks:
        layer = torch.nn.TransformerEncoderLayer(
            *(64, 4, 256, 0.0, "gelu", 1e-6), batch_first=True, norm_first=True, dtype=torch.float64
        )
        mine = block.state_dict()
        tensors = {key: tensor for key, tensor in mine.items() if key.startswith("norm")}
        for kind in ("weight", "bias"):
            tensors[f"self_attn.in_proj_{kind}"] = mine[f"attn.qkv.{kind}"]
            tensors[f"linear1.{kind}"] = mine[f"mlp.fc1.{kind}"]
        for scale, theirs, its in (("ls1", "self_attn.out_proj", "attn.proj"), ("ls2", "linear2", "mlp.fc2")):
            tensors[f"{theirs}.weight"] = mine[f"{scale}.gamma"][:, None] * mine[f"{its}.weight"]
            tensors[f"{theirs}.bias"] = mine[f"{scale}.gamma"] * mine[f"{its}.bias"]
        layer.load_state_dict(tensors)
        torch.testing.assert_close(block(x), layer.eval()(x))


def assert_same_without_logits(ours: Extractor, theirs: torch.nn.Module, features: int) -> None:
    found, logits = ours(images(2))
    assert (found.shape, logits.shape, ours.has_logits) == ((2, features), (2, 0), False)
    torch.testing.assert_close(found, theirs(images(2))[0], rtol=0, atol=0)
    assert found.std(0).max() > 0
    assert FRECHET_DISTANCE.name_under(ours) == f"fd_{ours.name}_{ours.digest[:8]}"


def random(network: M) -> M:
    """Filled so that activations keep their size."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.requires_grad_(False).named_parameters():
        deviation = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.1
        tensor.normal_(float("weight" in name and tensor.dim() == 1), deviation, generator=generator)
    return network.eval()


def overlapping(shape: torch.Size) -> torch.Tensor:
    """A random tensor whose rows share their memory, since VGG16's own would fill half a gigabyte."""
    columns = shape[1:].numel()
    line = torch.randn(shape[0] + columns, generator=torch.Generator().manual_seed(0)) * (2 / columns) ** 0.5
    return (
        line.as_strided(shape, (1, *torch.empty(shape[1:], device="meta").stride()))
        if len(shape) > 1
        else line[: shape[0]]
    )


def holder(tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A module with these parameters and no use."""

    class Holder(torch.nn.Module):
        def forward(self) -> int:
            return 0

    root = Holder()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module: torch.nn.Module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, Holder())
            module = module.get_submodule(part)
        module.register_buffer(last, tensor)
    return root


# --- download --------------------------------------------------------------------------------------------------------


class Server:
    """Serves one file, or the first half of it."""

    def __init__(self, content: bytes) -> None:
        self.content, self.breaks, self.requests = content, False, 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(server.content)))
                self.end_headers()

            def do_GET(self) -> None:
                server.requests += 1
                self.do_HEAD()
                self.wfile.write(server.content[: len(server.content) // 2] if server.breaks else server.content)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/weights-inception.pth"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(inception_file: Path) -> Iterator[Server]:
    server = Server(inception_file.read_bytes())
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def publish(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Publishes the server's file under a digest, for an empty home; returns where the file is kept there."""

    def as_inception(digest: str) -> Path:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setitem(published_networks.FILES, "inception", published_networks.Published(server.url, digest))
        return tmp_path / ".cache/sagan/weights-inception.pth"

    return as_inception


def test_published_weights_are_downloaded_once_where_that_is_asked_for(
    server: Server, publish: Callable[[str], Path]
) -> None:
    digest = hashlib.sha256(server.content).hexdigest()
    place = publish(digest)
    with pytest.raises(EnvironmentFault, match="no extractor file at ~/.cache/sagan/weights-inception.pth"):
        load_published("inception", None)
    assert server.requests == 0
    extractor = load_published("inception", None, download=True)
    assert place.read_bytes() == server.content
    assert (extractor.digest, FRECHET_DISTANCE.name_under(extractor)) == (digest, "fid")
    load_published("inception", None, download=True)
    assert server.requests == 1


def test_a_download_that_breaks_off_leaves_nothing_and_can_be_repeated(
    server: Server, publish: Callable[[str], Path]
) -> None:
    place = publish(hashlib.sha256(server.content).hexdigest())
    server.breaks = True
    with pytest.raises(EnvironmentFault, match=f"{server.url}: the transfer broke off"):
        load_published("inception", None, download=True)
    assert not place.exists()
    server.breaks = False
    load_published("inception", None, download=True)
    assert place.exists()


def test_what_is_not_the_published_file_is_not_kept(publish: Callable[[str], Path]) -> None:
    place = publish(hashlib.sha256(b"another file").hexdigest())
    with pytest.raises(CorruptError, match="is not the published file"):
        load_published("inception", None, download=True)
    assert not place.exists()


def test_weights_may_be_named_by_their_url(server: Server) -> None:
    assert load_published("inception", server.url).digest == hashlib.sha256(server.content).hexdigest()


# --- weights that are refused ----------------------------------------------------------------------------------------


def test_missing_inception_weights_say_where_they_are_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(EnvironmentFault) as caught:
        load_published("inception", None)
    assert "~/.cache/sagan/weights-inception-2015-12-05-6726825d.pth" in caught.value.message
    for hint in ("evaluate.extractor_weights", "evaluate.download", "https://", "classifier"):
        assert hint in caught.value.remedy


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "trapped"),)

    path = tmp_path / "weights.pth"
    torch.save({"x": Trap()}, path)
    with pytest.raises(UsageError, match="weights of inception"):
        load_published("inception", str(path))
    assert not (tmp_path / "trapped").exists()
    path.write_bytes(pickle.dumps(Trap(), protocol=2))
    with pytest.raises(UsageError, match="weights of inception"):
        load_published("inception", str(path))
    assert not (tmp_path / "trapped").exists()


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "weights.pth")
    with pytest.raises(UsageError, match=r"weights\.pth does not hold"):
        load_published("inception", str(tmp_path / "weights.pth"))
