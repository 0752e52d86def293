"""The extractor `classifier`: a small network that is trained once on the real images. It needs no download.

Its 64 features and its logits distinguish only the classes of this collection. This is enough for rehearsals.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.collection.derived_tensors import NoFacts, derived
from pipeline.collection.manifest import Collection
from pipeline.config.schema import DataSection
from pipeline.errors import UsageError, shown_url
from pipeline.evaluation.extractors.extractor import Extractor
from pipeline.streaming.read_images import read_images
from pipeline.streaming.stream import Stream
from sagan.ranks import World

log = logging.getLogger(__name__)

RECIPE = 1  # part of the stored name; increase it with every change of the training
FEATURES = 64
BATCH = 64
EPOCHS = 15
LEAST_IMAGES, MOST_IMAGES = 20_000, 300_000


class Classifier(nn.Module):
    """Strided convolutions down to 4×4, a mean over locations (64 features), and one linear layer."""

    def __init__(self, resolution: int, classes: int) -> None:
        super().__init__()
        stages = int(math.log2(resolution)) - 2
        widths = [min(FEATURES, 4 * FEATURES // 2 ** (stages - i)) for i in range(stages)]
        layers: list[nn.Module] = []
        for before, width in zip([3, *widths], widths, strict=False):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.stages = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images uint8 [n, 3, H, W] to (features float32 [n, 64], logits float32 [n, classes])."""
        x = images.to(torch.float32).mul(2 / 255).sub(1)
        features = self.stages(x).mean((2, 3))
        return features, self.head(features)


def classifier(collection: Collection, data: DataSection, seed: int, device: str = "cpu") -> Extractor:
    """Return the classifier of (collection, recipe, seed). Train it on the `train` split unless it is stored already.

    Args:
        collection: The collection. The classifier is stored beside it.
        data: Shard cache and number of decoding threads.
        seed: Seed of the initial weights, of the order of the images and of their shifts.
        device: Device of the extractor.

    Raises UsageError for a collection without classes.
    """
    require_classes(collection)
    with torch.device("meta"):
        expected = Classifier(collection.resolution, collection.num_classes).state_dict()
    name = f"classifier-v{RECIPE}-seed{seed}"
    tensors, _, digest = derived(collection, name, lambda: _train_and_check(collection, data, seed), expected, NoFacts)
    network = Classifier(collection.resolution, collection.num_classes)
    network.load_state_dict(tensors)
    network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Extractor("classifier", digest, network.eval().requires_grad_(False), device=device)


def require_classes(collection: Collection) -> None:
    """Raise UsageError where the collection has fewer than two classes, or no split `train` with their images."""
    remedy = "set evaluate.extractor to inception, or to a TorchScript or torch.export file"
    if "train" not in collection.splits:
        raise UsageError(
            f"evaluate.extractor is classifier, which learns from the split train, but {collection.url} has only "
            f"{', '.join(collection.splits)}",
            remedy,
        )
    if collection.num_classes < 2:
        raise UsageError(
            f"evaluate.extractor is classifier, but {collection.url} has no classes to learn",
            remedy,
        )


def train(batches: Iterator[tuple[Tensor, Tensor]], resolution: int, classes: int, steps: int, seed: int) -> Classifier:
    """Train a classifier. The same input and seed give the same classifier.

    The optimiser is AdamW with a one-cycle learning rate. Each batch is shifted by up to a sixteenth of the image side.

    Args:
        batches: Pairs (images uint8 [n, 3, H, W], labels int64 [n]).
        resolution: Side of the images in pixels.
        classes: Number of classes.
        steps: Number of steps, one batch each.
        seed: Seed of the initial weights and of the shifts.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Classifier(resolution, classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    shifts = torch.Generator().manual_seed(seed)
    largest_shift = resolution // 16
    for _, (images, labels) in zip(range(steps), batches, strict=False):
        shift = torch.randint(-largest_shift, largest_shift + 1, (2,), generator=shifts).tolist()
        _, logits = network(torch.roll(images, shift, (2, 3)))
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def _train_and_check(collection: Collection, data: DataSection, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train the classifier, and return its state dict and facts. Facts include its accuracy on held-out images."""
    size = collection.size("train")
    steps = min(max(EPOCHS * size, LEAST_IMAGES), MOST_IMAGES) // BATCH
    where = shown_url(collection.url)
    log.info("training the classifier (seed %d) of %s: %d steps, once for all runs", seed, where, steps)
    # The order of images is part of the recipe. The job's lanes and window must not change the classifier.
    order = DataSection(train=collection.url, cache=data.cache, cache_gb=data.cache_gb, threads=data.threads)
    stream = Stream(collection, "train", seed=seed, world=World(), data=order)
    try:
        pairs = ((batch.images, batch.labels) for batch in stream.batches(0, min(BATCH, size)))
        network = train(pairs, collection.resolution, collection.num_classes, steps, seed)
    finally:
        stream.close()
    facts: dict[str, Any] = {"resolution": collection.resolution, "classes": collection.num_classes, "seed": seed}
    if "heldout" in collection.splits:
        facts["heldout_accuracy"] = _accuracy(network, collection, data)
        log.info("the classifier recognises %.1f %% of held-out real images", 100 * facts["heldout_accuracy"])
    return network.state_dict(), facts


@torch.inference_mode()
def _accuracy(network: Classifier, collection: Collection, data: DataSection) -> float:
    """Return the share of held-out images whose class the network recognises."""
    ids = torch.arange(collection.splits["heldout"].start, collection.splits["heldout"].stop).numpy()
    images = read_images(collection, ids, data.cache, data.cache_gb, data.threads)
    guesses = torch.cat([network(part)[1].argmax(1) for part in images])
    return float((guesses == torch.from_numpy(collection.labels[ids])).double().mean())
