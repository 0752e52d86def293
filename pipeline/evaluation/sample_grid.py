"""The picture of a scored model: samples of the same latents each time, beside real images of the same classes."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from pipeline.collection.manifest import Collection
from pipeline.config.schema import DataSection, EvaluateSection
from pipeline.image_grid import beside_real
from pipeline.streaming.read_images import read_images
from sagan.random import Purpose, draw_latents
from sagan.trained_model import Model

COLUMNS = 8


def sample_grid(
    model: Model, section: EvaluateSection, collection: Collection, data: DataSection, title: str
) -> Image.Image:
    """Draw at most `evaluate.grid` samples beside as many real images of `evaluate.split`.

    Where there are at most as many classes as images, each class has a row. Where there are more classes, evenly spaced
    classes have one image each. Images of an unconditional model have no order.
    """
    ids = np.asarray(collection.ids(section.split))
    classes, count = model.config.known_num_classes, min(section.grid, len(ids))
    if not classes:
        columns, labels, chosen = COLUMNS, None, ids[:count]
    else:
        columns = max(1, count // classes) if classes <= count else COLUMNS
        shown = np.arange(classes) if classes <= count else np.arange(count) * classes // count
        per_class = columns if classes <= count else 1
        members = [ids[collection.labels[ids] == c][:per_class] for c in shown]
        labels = np.concatenate([np.full(len(m), c) for c, m in zip(shown, members, strict=True)])
        chosen = np.concatenate(members)
    names = model.class_names or [str(c) for c in range(classes)]
    captions = None if labels is None else [names[c] for c in labels]
    z = draw_latents(section.seed, Purpose.SAMPLE_Z, range(len(chosen)), model.config.z_dim)
    y = None if labels is None else torch.from_numpy(labels)
    generated = torch.cat(
        [model.generate(z[i : i + 64], None if y is None else y[i : i + 64]).cpu() for i in range(0, len(z), 64)]
    )
    real = torch.cat(list(read_images(collection, chosen, data.cache, data.cache_gb, data.threads)))
    return beside_real(generated, real, captions, columns, title)
