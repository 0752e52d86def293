import pytest
import torch

from sagan.config import ModelConfig
from sagan.discriminator import Discriminator
from sagan.spectral_norm import layers


@pytest.mark.parametrize(("resolution", "classes"), [(32, 10), (64, 10), (128, 10), (256, 3), (32, 0), (64, 0)])
def test_one_class_serves_every_resolution(resolution, classes):
    config = ModelConfig(resolution=resolution, num_classes=classes, channels_d=8)
    images, y = torch.rand(2, 3, resolution, resolution) * 2 - 1, torch.tensor([0, 1]) if classes else None
    assert Discriminator(config)(images, y).shape == (2,)


def test_spectral_norm_is_on_23_layers_and_on_the_embedding():
    with torch.device("meta"):
        discriminator = Discriminator(ModelConfig(resolution=128, num_classes=1000, attention=(32,)))
    assert len(list(layers(discriminator))) == 23
    assert "embedding" in dict(layers(discriminator))


def test_the_projection_separates_classes():
    """The logit moves with the label by ⟨features, embedding⟩, whose weight is normalised."""
    torch.manual_seed(0)
    config = ModelConfig(resolution=32, num_classes=4, channels_d=8, attention=())
    discriminator = Discriminator(config).double()
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    features = torch.relu(discriminator.blocks(x)).sum((2, 3))
    unconditional = discriminator.linear(features).squeeze(1)
    y = torch.tensor([2, 0, 3])
    by_hand = unconditional + (features * discriminator.embedding.normalised_weight[y]).sum(1)
    torch.testing.assert_close(discriminator(x, y), by_hand, rtol=0, atol=1e-12)


def test_the_classifier_says_how_likely_the_label_is():
    """The logit does not depend on the label; the second output is the log-softmax of the classifier at the label."""
    torch.manual_seed(0)
    config = ModelConfig(resolution=32, num_classes=4, channels_d=8, attention=(), condition_d="classifier")
    discriminator = Discriminator(config).double()
    assert discriminator.embedding is None
    assert "classifier" in dict(layers(discriminator))
    x, y = torch.rand(3, 3, 32, 32, dtype=torch.float64), torch.tensor([2, 0, 3])
    features = torch.relu(discriminator.blocks(x)).sum((2, 3))
    scores = features @ discriminator.classifier.normalised_weight.t() + discriminator.classifier.bias
    likelihoods = scores.exp() / scores.exp().sum(1, keepdim=True)
    by_hand = torch.stack([discriminator.linear(features).squeeze(1), likelihoods[range(3), y].log()], dim=1)
    torch.testing.assert_close(discriminator(x, y), by_hand, rtol=0, atol=1e-12)


def test_without_classes_there_is_no_classifier():
    config = ModelConfig(resolution=32, num_classes=0, channels_d=8, condition_d="classifier")
    assert Discriminator(config)(torch.rand(2, 3, 32, 32), None).shape == (2,)
