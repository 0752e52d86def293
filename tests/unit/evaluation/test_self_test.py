from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.collection.manifest import Collection
from pipeline.config.schema import DataSection, EvaluateSection, PackSection
from pipeline.errors import SaganError, UsageError
from pipeline.evaluation import self_test
from pipeline.evaluation.extractors.extractor import Extractor
from pipeline.evaluation.features import Real
from pipeline.evaluation.scorer import Scorer
from pipeline.packing.pack import pack

DEGRADED = [*(f"noise {deviation:g}" for deviation in self_test.NOISE), *("blur 0.5", "blur 1", "blur 2", "blur 4")]
Outputs = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Examined:
    """What the self-test says of a function of float images [n, 3, H, W], on 120 digits."""

    digits: Collection
    data: DataSection

    def __call__(self, function: object) -> list[self_test.Finding]:
        def network(images: torch.Tensor) -> Outputs:
            features = function(images.float())  # type: ignore[operator]
            return features, features[:, :0]

        extractor = Extractor("some", "00" * 32, network, has_logits=False)
        scorer = Scorer(EvaluateSection(), self.digits, self.data, extractor, None)
        return self_test.examine(scorer, Real(self.digits, np.arange(120), self.data))


@pytest.fixture
def examined(digits: Collection, data: DataSection) -> Examined:
    return Examined(digits, data)


def edges(images: torch.Tensor) -> torch.Tensor:
    """How much neighbours differ, in each quarter: any noise and any blur moves it."""
    return torch.nn.functional.avg_pool2d(images.diff(dim=3, append=images[..., -1:]).abs(), 16).flatten(1)


def failed(findings: list[self_test.Finding]) -> set[str]:
    return {finding.what for finding in findings if finding.failure}


def test_an_extractor_that_sees_passes(examined: Examined) -> None:
    findings = examined(edges)
    assert [finding.what for finding in findings] == ["the same images", "their halves", *DEGRADED]
    assert not failed(findings)
    assert findings[0].distance == pytest.approx(0, abs=1e-4)  # roots of eigenvalues that should be 0
    for growing in (findings[2:6], findings[6:]):
        distances = [finding.distance or 0.0 for finding in growing]
        assert distances == sorted(distances)
    self_test.require_passed(findings)


def test_one_that_ignores_its_input_fails(examined: Examined) -> None:
    findings = examined(lambda images: torch.ones(len(images), 3))
    assert failed(findings) == set(DEGRADED)
    with pytest.raises(SaganError, match="noise 8, .* blur 4") as caught:
        self_test.require_passed(findings)
    assert "does not see it" in caught.value.remedy


def test_one_that_overflows_fails(examined: Examined) -> None:
    always = examined(lambda images: torch.full((len(images), 3), torch.inf))
    assert failed(always) == {"real images"}
    # e^88.7 is the largest float32; neighbours differ by 38.7 in the mean only where there is strong noise
    sometimes = examined(lambda images: torch.exp(edges(images) + 50))
    assert (sometimes[5].what, sometimes[5].distance) == ("noise 64", None)
    assert "noise 64" in failed(sometimes)
    with pytest.raises(SaganError) as caught:
        self_test.require_passed(sometimes)
    assert "not finite" in caught.value.remedy


def test_one_that_is_random_or_depends_on_the_batch_fails(examined: Examined) -> None:
    dropout = torch.nn.Dropout(0.5)  # in training mode
    assert "the same images" in failed(examined(lambda images: dropout(edges(images))))
    norm = torch.nn.BatchNorm1d(12, affine=False)  # likewise
    assert "the same images" in failed(examined(lambda images: norm(edges(images))))


def test_more_features_than_images_can_tell_fail_on_halves(examined: Examined) -> None:
    found = examined(lambda images: images.flatten(1)[:, ::4] + 1000 * torch.sin(1e4 * images.flatten(1)[:, ::4]))
    assert "their halves" in failed(found)


def test_the_classifier_of_the_digits_passes(digits: Collection) -> None:
    arguments = ["evaluate", "--self-test", "--reference", digits.url, "--extractor", "classifier", "--samples", "200"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output.count(" ok") == 2 + len(DEGRADED)


@pytest.mark.slow
def test_resnet56_on_cifar10_passes(test_data: Path | None, tmp_path: Path) -> None:
    if test_data is None:
        pytest.skip("real images are in the folder that SAGAN_TEST_DATA names")
    source = {"train": str(test_data / "cifar10-train-5000.tar")}
    collection = pack(str(tmp_path / "cifar10"), PackSection(source=source, resolution=32))
    section = EvaluateSection(extractor=str(test_data / "resnet56-cifar10.ts"), trust_extractor=True, samples=500)
    self_test.require_passed(self_test.self_test(section, collection.url))


def test_a_failure_is_an_exit_code_with_what_it_means(digits: Collection, tmp_path: Path) -> None:
    class Blind(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> Outputs:
            features = torch.ones(images.shape[0], 3)
            return features, features

    torch.jit.script(Blind()).save(str(tmp_path / "blind.ts"))
    extractor = ["--extractor", str(tmp_path / "blind.ts"), "--trust-extractor", "--samples", "50"]
    arguments = ["evaluate", "--self-test", "--reference", digits.url, *extractor]
    with pytest.raises(SaganError, match="the self-test fails on noise 8") as caught:
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert caught.value.exit_code == 1


def test_it_needs_no_model(digits: Collection) -> None:
    for arguments in ([], ["some/model", "--self-test"]):
        with pytest.raises(UsageError, match="either a model or --self-test"):
            CliRunner().invoke(app, ["evaluate", *arguments, "--reference", digits.url], catch_exceptions=False)


def test_fewer_than_four_images_have_no_halves(digits: Collection) -> None:
    with pytest.raises(UsageError, match="needs at least 4 images, but there are 3"):
        self_test.self_test(EvaluateSection(extractor="classifier", samples=3), digits.url)
    section = EvaluateSection(extractor="classifier", samples=4)
    assert all(finding.distance is not None for finding in self_test.self_test(section, digits.url))
