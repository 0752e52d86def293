from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from pipeline.collection.manifest import Collection
from pipeline.config.job_file import parse_job
from pipeline.config.schema import DataSection, EvaluateSection
from pipeline.errors import ConfigError, EnvironmentFault
from pipeline.evaluation.extractors.load_extractor import load_extractor


class Mean(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = images.float().mean((2, 3))
        return x, x


def test_a_section_names_a_network_a_file_or_the_classifier(
    digits: Collection, data: DataSection, inception_file: Path, tmp_path: Path
) -> None:
    torch.jit.script(Mean()).save(str(tmp_path / "mean.ts"))
    network, file, classifier = (
        load_extractor(section, digits, data, classifier_seed=0)
        for section in (
            EvaluateSection(
                extractor="inception",
                extractor_weights=str(inception_file),
                resize="clean",
                extractor_dtype="float64",
            ),
            EvaluateSection(extractor=str(tmp_path / "mean.ts"), trust_extractor=True),
            EvaluateSection(extractor="classifier"),
        )
    )
    assert (network.name, network.resize, network.dtype) == ("inception", "clean-bicubic-299", "float64")
    assert network.digest == hashlib.sha256(inception_file.read_bytes()).hexdigest()
    assert (file.name, file.resize, file.dtype) == ("mean", "none", "float32")
    assert (classifier.name, classifier.resize, classifier.dtype) == ("classifier", "none", "float32")
    other = load_extractor(EvaluateSection(extractor="classifier"), digits, data, classifier_seed=1)
    assert other.digest != classifier.digest


def test_missing_weights_name_their_path(digits: Collection, data: DataSection, tmp_path: Path) -> None:
    section = EvaluateSection(extractor="vgg16", extractor_weights=str(tmp_path / "missing.pth"))
    with pytest.raises(EnvironmentFault, match=r"no extractor file at .*missing\.pth"):
        load_extractor(section, digits, data, classifier_seed=0)


def test_what_does_not_apply_to_an_extractor_is_refused() -> None:
    for section, said in (
        ({"extractor": "classifier", "resize": "clean"}, "resize: clean needs evaluate.extractor: inception"),
        ({"extractor": "classifier", "extractor_dtype": "float64"}, "float64 is not available for classifier"),
        ({"extractor": "some.ts", "extractor_dtype": "float64"}, "float64 is not available for .*some.ts"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_job({"kind": "evaluate", "name": "e", "model": "m", "reference": "r", "evaluate": section}, "test")
