"""DiffAugment: random changes of all images that the discriminator gets (Zhao et al. 2020, arXiv 2006.10738).

Colour, translation and cutout change real and generated images alike. The gradient of the generator passes through the
changes, so that the generator learns images without them. Ranges and order are those of the official code
(mit-han-lab/data-efficient-gans).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sagan.random import Purpose, draw_uniform


def draw_parameters(seed: int, purpose: Purpose, positions: range, size: int) -> Tensor:
    """Return the parameters of the changes of one image per position, float32 [len(positions), 7].

    The columns are brightness in (−1/2, 1/2), saturation in (0, 2), contrast in (1/2, 3/2), the translation in pixels
    (rows, columns) and the first pixel of the cutout (row, column). A translation is a whole number from −size/8 to
    size/8. The cutout is a square of size/2 pixels per side. Its centre, which is size/4 pixels after its first one, is
    from 0 to size in both directions. So a part of the square may be outside the image.

    Args:
        seed: seed of the draw.
        purpose: which images the parameters are for.
        positions: positions of the images in the run.
        size: pixels per side of the images, a multiple of 8.
    """
    u = draw_uniform(seed, purpose, positions, 7)
    colour = u[:, :3] * torch.tensor([1, 2, 1]) + torch.tensor([-0.5, 0, 0.5])
    reach = size // 8
    translation = (u[:, 3:5] * (2 * reach + 1)).floor() - reach
    cutout = (u[:, 5:] * (size + 1)).floor() - size // 4
    return torch.cat([colour, translation, cutout], dim=1).float()


def augment(images: Tensor, parameters: Tensor) -> Tensor:
    """Change images with the parameters of `draw_parameters`.

    The changes are computed in float32 at least.

    Args:
        images: [b, 3, size, size].
        parameters: [b, 7], on the device of the images.

    Returns images of the same shape and dtype, in the memory format channels_last.
    """
    x = images.to(torch.promote_types(images.dtype, torch.float32))
    brightness, saturation, contrast = parameters[:, :3, None, None, None].to(x.dtype).unbind(1)
    translation, cutout = parameters[:, 3:].long().split(2, dim=1)
    x = change_contrast(change_saturation(x + brightness, saturation), contrast)
    x = cut_out(translate(x, translation), cutout)
    return x.to(images.dtype, memory_format=torch.channels_last)


def change_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply the distance of each pixel from the mean of its channels by `factor`, [b, 1, 1, 1]."""
    mean = x.mean(1, keepdim=True)
    return (x - mean) * factor + mean


def change_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply the distance of each value from the mean of its image by `factor`, [b, 1, 1, 1]."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * factor + mean


def translate(x: Tensor, pixels: Tensor) -> Tensor:
    """Return y with y[r, c] = x[r + pixels[0], c + pixels[1]], and 0 where x has no such pixel.

    Args:
        x: images [b, 3, size, size].
        pixels: int64 [b, 2].
    """
    size = x.shape[-1]
    rows, columns = (torch.arange(size, device=x.device) + pixels[..., None]).unbind(1)
    exists = _pairs((rows >= 0) & (rows < size), (columns >= 0) & (columns < size))
    source = rows.clamp(0, size - 1)[:, :, None] * size + columns.clamp(0, size - 1)[:, None, :]
    source = source.flatten(1)[:, None].expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, source).view(x.shape) * exists


def cut_out(x: Tensor, first: Tensor) -> Tensor:
    """Return the images with 0 in a square of half their width and height.

    Args:
        x: images [b, 3, size, size].
        first: int64 [b, 2], row and column of the first pixel of the square. It may be outside the image.
    """
    size = x.shape[-1]
    offsets = torch.arange(size, device=x.device) - first[..., None]
    rows, columns = ((offsets >= 0) & (offsets < size // 2)).unbind(1)
    return x * ~_pairs(rows, columns)


def _pairs(rows: Tensor, columns: Tensor) -> Tensor:
    """Return which pixels have one of the rows and one of the columns, bool [b, 1, size, size], for bool [b, size]."""
    return (rows[:, :, None] & columns[:, None, :])[:, None]
