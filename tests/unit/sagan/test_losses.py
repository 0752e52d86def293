import torch

from sagan import losses


def test_hinge_losses_equal_values_computed_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, -0.5, 1.0])
    assert losses.discriminator_hinge(real, fake) == (0 + 0.5 + 2) + (0 + 0.5 + 2)
    assert losses.generator_hinge(fake) == 1.5
