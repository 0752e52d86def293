"""torch-fidelity's metrics on our features, so that a figure means what it means in every paper that used it."""

from __future__ import annotations

from torch import Tensor

from pipeline.evaluation.fidelity import import_torch_fidelity
from pipeline.evaluation.statistics import Moments, frechet_distance

ISC_SPLITS = 10
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3


def inception_score(logits: Tensor, splits: int = ISC_SPLITS) -> float:
    """exp E KL(p(y|x) ‖ p(y)) from logits [N, K]: mean over shuffled splits (fewer where N < 10)."""
    import_torch_fidelity()
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    splits = min(splits, len(logits))
    return float(isc_features_to_metric(logits, splits=splits, shuffle=True, rng_seed=2020)[KEY_METRIC_ISC_MEAN])


def kernel_distance(generated: Tensor, real: Tensor) -> float:
    """KID of features [N, D] and [M, D]: mean over 100 subsets of 1 000 (or all, where there are fewer)."""
    import_torch_fidelity()
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    size = min(KID_SUBSET_SIZE, len(generated), len(real))
    metric = kid_features_to_metric(
        generated, real, kid_subsets=KID_SUBSETS, kid_subset_size=size, rng_seed=2020, verbose=False
    )
    return float(metric[KEY_METRIC_KID_MEAN])


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019), k = 3, of features [N, D] and [M, D]; N, M > 3."""
    import_torch_fidelity()
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    metric = prc_features_to_metric(
        generated, real, prc_neighborhood=NEIGHBOURS, prc_batch_size=1000, save_cpu_ram=True, verbose=False
    )
    return float(metric[KEY_METRIC_PRECISION]), float(metric[KEY_METRIC_RECALL])


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows of logits [N, K] whose largest is at the asked label, int64 [N]."""
    return float((logits.argmax(1) == labels).double().mean())


def least_images(features: int) -> int:
    """Of a class, so that a Fréchet distance of so many features is more than noise: two for each of them.

    Halves of a class of real CIFAR-10 images (500 each, 64 features of ResNet-56, mean over the classes) are apart by
    0.69, 0.19, 0.10 and 0.05 of the class's variance with 1/4, 1, 2 and 4 images a feature in each half. JPEG of
    quality 50 moves a class by 0.4 to 1.4 of it, another class is 7 away.
    """
    return 2 * features


def class_distance(generated: Tensor, real: Tensor) -> float | None:
    """Fréchet distance of one class's features [n, D] and [m, D]; None where there are fewer than `least_images`."""
    if min(len(generated), len(real)) < least_images(real.shape[1]):
        return None
    return frechet_distance(Moments.of(generated), Moments.of(real))


def higher_is_better(metric: str) -> bool:
    return metric.startswith(("isc", "class_accuracy", "precision", "recall"))
