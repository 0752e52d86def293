from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import pytest
import torch

from pipeline.errors import EnvironmentFault, UsageError
from pipeline.evaluation import extractors
from pipeline.evaluation.fidelity import import_torch_fidelity
from pipeline.evaluation.statistics import Moments, frechet_distance


class Tiny(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = images.float().mean((2, 3))
        return x, x[:, :2]


def images(n: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded random weights, scaled so that activations keep their size. Scores with them mean nothing."""
    import_torch_fidelity()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Bare(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: object, **kwargs: object) -> None:
            pass

    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save({}, path)
    network = Bare("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=generator)
    torch.save(network.state_dict(), path)
    return path


def test_inception_under_other_weights_is_never_called_fid(inception_file: Path) -> None:
    extractor = extractors.inception(str(inception_file))
    digest = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    assert extractor.digest == digest
    assert extractor.metric("fd") == f"fid_inception_{digest[:8]}"


def test_inception_features_and_distance_are_torch_fidelitys(inception_file: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    ours = extractors.inception(str(inception_file))
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


def test_missing_inception_weights_say_where_they_are_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(EnvironmentFault) as caught:
        extractors.inception(None)
    assert "~/.cache/sagan/weights-inception-2015-12-05-6726825d.pth" in caught.value.message
    for hint in ("evaluate.weights", "https://", "classifier"):
        assert hint in caught.value.remedy


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "trapped"),)

    path = tmp_path / "weights.pth"
    torch.save({"x": Trap()}, path)
    with pytest.raises(UsageError, match="Inception weights"):
        extractors.inception(str(path))
    assert not (tmp_path / "trapped").exists()
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UsageError, match="Inception weights"):
        extractors.inception(str(path))
    assert not (tmp_path / "trapped").exists()


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "weights.pth")
    with pytest.raises(UsageError, match=r"weights\.pth does not hold"):
        extractors.inception(str(tmp_path / "weights.pth"))


def test_files_of_either_kind_give_the_same_features(tmp_path: Path) -> None:
    torch.jit.script(Tiny()).save(str(tmp_path / "tiny net.ts"))
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(Tiny(), (images(2),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "tiny net.pt2")
    scripted, exported = (extractors.from_file(str(tmp_path / f"tiny net.{end}"), 32) for end in ("ts", "pt2"))
    for n in (1, 5):
        for one, other in zip(scripted(images(n)), exported(images(n)), strict=True):
            torch.testing.assert_close(one, other)
    assert scripted.digest == hashlib.sha256((tmp_path / "tiny net.ts").read_bytes()).hexdigest()
    assert scripted.digest != exported.digest
    assert scripted.metric("fd") == "fd_tiny_net"


def test_a_users_file_cannot_take_a_name_that_means_something(tmp_path: Path) -> None:
    torch.jit.script(Tiny()).save(str(tmp_path / "inception.ts"))
    assert extractors.from_file(str(tmp_path / "inception.ts"), 32).metric("fd") == "fd_inception-file"


def test_what_is_no_extractor_is_refused_with_what_one_is(tmp_path: Path) -> None:
    class Flat(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = images.float()
            return x, x

    (tmp_path / "text.ts").write_text("hello")
    torch.jit.script(Flat()).save(str(tmp_path / "flat.ts"))
    for name in ("text.ts", "flat.ts"):
        with pytest.raises(UsageError, match=name) as caught:
            extractors.from_file(str(tmp_path / name), 32)
        assert "[n, D]" in caught.value.remedy
    with pytest.raises(EnvironmentFault, match=r"no extractor file at .*nowhere\.ts"):
        extractors.from_file(str(tmp_path / "nowhere.ts"), 32)
