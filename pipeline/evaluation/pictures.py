"""The picture of a score: the same latents every time, beside real images of the same classes."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from pipeline.config.schema import DataSection, EvaluateSection
from pipeline.data.grids import beside_real
from pipeline.data.index import Collection
from pipeline.data.stream import read_images
from sagan.random import Purpose, latents
from sagan.sampling import Model

COLUMNS = 8


def sample_picture(
    model: Model, section: EvaluateSection, collection: Collection, data: DataSection, title: str
) -> Image.Image:
    """At most `evaluate.grid` samples beside as many real images of `evaluate.split`.

    Few classes get a row each, many one image each, without classes images just follow each other.
    """
    ids = np.asarray(collection.ids(section.split))
    classes, count = model.config.labels, min(section.grid, len(ids))
    if not classes:
        columns, asked, chosen = COLUMNS, None, ids[:count]
    else:
        columns = max(1, count // classes) if classes <= count else COLUMNS
        shown = np.arange(classes) if classes <= count else np.arange(count) * classes // count
        per_class = columns if classes <= count else 1
        members = [ids[collection.labels[ids] == c][:per_class] for c in shown]
        asked = np.concatenate([np.full(len(m), c) for c, m in zip(shown, members, strict=True)])
        chosen = np.concatenate(members)
    names = model.class_names or [str(c) for c in range(classes)]
    captions = None if asked is None else [names[c] for c in asked]
    z = latents(section.seed, Purpose.SAMPLE_Z, range(len(chosen)), model.config.z_dim)
    y = None if asked is None else torch.from_numpy(asked)
    generated = torch.cat(
        [model.generate(z[i : i + 64], None if y is None else y[i : i + 64]).cpu() for i in range(0, len(z), 64)]
    )
    real = torch.cat(list(read_images(collection, chosen, data.cache, data.cache_gb, data.threads)))
    return beside_real(generated, real, captions, columns, title)
