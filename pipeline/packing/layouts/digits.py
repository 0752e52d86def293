"""scikit-learn's handwritten digits: a collection that needs no download."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipeline.packing.image_source import Source

DIGITS = "digits"


def digits() -> Source:
    """Read scikit-learn's 1 797 handwritten digits, 8 x 8 grey: 1 437 in train and 360 in heldout, drawn at random.

    The draw is not stratified. Generated images are compared with held-out images, and their classes are drawn at
    random too.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)
    labels = data.target.astype(np.int64)
    train, heldout = train_test_split(np.arange(len(labels)), test_size=360, random_state=0)

    def read(i: int) -> bytes:
        out = io.BytesIO()
        Image.fromarray(pixels[i]).save(out, "PNG")
        return out.getvalue()

    return Source(
        kind="scikit-learn digits",
        keys=[f"{label}/{i:04d}" for i, label in enumerate(labels)],
        labels=labels,
        class_names=[str(digit) for digit in range(10)],
        splits={"train": np.sort(train), "heldout": np.sort(heldout)},
        read=read,
        left_out={},
        local_only=True,  # packing the digits here takes less time than asking a cluster
    )
