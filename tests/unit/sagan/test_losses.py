import math

import torch

from sagan import losses
from sagan.losses import Loss


def test_hinge_losses_equal_values_computed_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, -0.5, 1.0])
    assert losses.discriminator_hinge(real, fake) == (0 + 0.5 + 2) + (0 + 0.5 + 2)
    assert losses.generator_hinge(fake) == 1.5


def test_cross_entropies_equal_values_computed_by_hand():
    real, fake = torch.tensor([2.0, -1.0]).double(), torch.tensor([0.5, -300.0]).double()
    s = [1 / (1 + math.exp(-logit)) for logit in (2.0, -1.0, 0.5)]
    expected = -math.log(s[0]) - math.log(s[1]) - math.log(1 - s[2])  # and the sure −300 costs nothing
    torch.testing.assert_close(losses.discriminator_bce(real, fake).item(), expected, rtol=1e-12, atol=0)
    assert math.isclose(losses.generator_bce(fake).item(), -math.log(s[2]) + 300, rel_tol=1e-12)  # no saturation
    assert Loss("bce").discriminator(real, fake) == losses.discriminator_bce(real, fake)
    assert Loss("bce").generator(fake) == losses.generator_bce(fake)


def test_the_classification_counts_in_both_networks_with_its_weight():
    """−λ log p(y | x), of real and generated images for the discriminator, of generated ones for the generator."""
    real, fake = torch.tensor([[2.0, -0.1], [0.5, -0.2]]), torch.tensor([[-2.0, -1.0], [1.0, -4.0]])
    loss = Loss("hinge", auxiliary_weight=0.5)
    hinge = losses.discriminator_hinge(real[:, 0], fake[:, 0])
    torch.testing.assert_close(loss.discriminator(real, fake), hinge + 0.5 * (0.1 + 0.2 + 1 + 4))
    torch.testing.assert_close(loss.generator(fake), losses.generator_hinge(fake[:, 0]) + 0.5 * (1 + 4))


def test_without_a_classifier_its_weight_has_no_effect():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 1.0])
    assert Loss(auxiliary_weight=7.0).discriminator(real, fake) == losses.discriminator_hinge(real, fake)
    assert Loss(auxiliary_weight=7.0).generator(fake) == losses.generator_hinge(fake)
