"""The method of a run holds the keys that decide its numbers. A collection completes a job."""

import pytest

from pipeline.config.job_file import load_job, parse_overrides
from pipeline.config.run_method import ADDED, complete_model, completed, digest_of, method_differences, method_of
from pipeline.errors import UsageError
from tests.shipped_jobs import JOBS, shipped

SHIPPED = shipped()
COLLECTION = "d" * 64


def imagenet(**overrides):
    return complete_model(load_job(JOBS / "imagenet128.yaml", overrides), 128, 1000)


@pytest.mark.parametrize("name", [name for name, (_, overrides) in SHIPPED.items() if overrides])
def test_a_variant_is_another_method_in_three_keys_or_fewer(name):
    job, overrides = SHIPPED[name]
    assert len(overrides) <= 3
    methods = [method_of(load_job(job, parse_overrides(given)), COLLECTION) for given in ([], overrides)]
    differing = {key for key in methods[0] if methods[0][key] != methods[1][key]}
    assert differing == {override.partition("=")[0] for override in overrides}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.architecture", "dcgan"),
        ("model.init_std", 0.02),
        ("model.condition_d", "classifier"),
        ("optim.loss", "bce"),
        ("optim.auxiliary_weight", 0.5),
        ("data.augment", "diffaugment"),
    ],
)
def test_a_new_key_makes_another_method_and_its_default_leaves_the_digests_of_older_runs(key, value):
    method = method_of(imagenet(), COLLECTION)
    older = {key: value for key, value in method.items() if key not in ADDED}
    assert len(older) < len(method)
    assert completed(older) == method
    assert digest_of(older) == digest_of(method)
    assert digest_of(method_of(imagenet(**{key: value}), COLLECTION)) != digest_of(older)


def test_price_and_budget_are_not_part_of_a_method():
    priced = imagenet(**{"resources.price_per_device_hour": 2.5, "budget.cost": 1000, "budget.hours": 300})
    assert digest_of(method_of(priced, COLLECTION)) == digest_of(method_of(imagenet(), COLLECTION))
    assert priced.budget_hours == 300


def test_the_start_is_part_of_a_method_that_has_one():
    plain = method_of(imagenet(), COLLECTION)
    assert not any(key.startswith("init") for key in plain), "the digests of runs without it stay as they are"
    starts = [
        method_of(imagenet(**{"init.source": "models:/a@champion", **more}), COLLECTION, digest)
        for more, digest in (({}, "a" * 64), ({}, "b" * 64), ({"init.optimizers": True}, "a" * 64))
    ]
    assert len({digest_of(method) for method in (plain, *starts)}) == 4
    elsewhere = method_of(imagenet(**{"init.source": "s3://bucket/runs/a"}), COLLECTION, "a" * 64)
    assert elsewhere == starts[0], "the place of a source is not part of a method"


@pytest.mark.parametrize(
    ("key", "value"),
    [("optim.lr_d", 1e-4), ("seed", 1), ("train.batch", 128), ("data.flip", True), ("model.z_dim", 64)],
)
def test_a_key_that_decides_the_numbers_makes_another_method(key, value):
    reference = digest_of(method_of(imagenet(), COLLECTION))
    assert digest_of(method_of(imagenet(**{key: value}), COLLECTION)) != reference


def test_another_collection_makes_another_method():
    assert digest_of(method_of(imagenet(), COLLECTION)) != digest_of(method_of(imagenet(), "e" * 64))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.workers", 4),
        ("train.kimg", 1),
        ("data.train", "s3://elsewhere"),
        ("data.expected_classes", 10),
        ("evaluate.samples", 5),
    ],
)
def test_places_lengths_and_resources_make_no_other_method(key, value):
    reference = digest_of(method_of(imagenet(), COLLECTION))
    assert digest_of(method_of(imagenet(**{key: value}), COLLECTION)) == reference


def test_a_job_that_contradicts_its_collection_is_refused_with_both_values():
    with pytest.raises(UsageError, match="model.resolution is 128, but the collection has 64"):
        complete_model(load_job(JOBS / "imagenet128.yaml"), 64, 1000)
    with pytest.raises(UsageError, match="model.num_classes is 10, but the collection has 0") as caught:
        complete_model(load_job(JOBS / "imagenet128.yaml", {"model.num_classes": 10}), 128, 0)
    assert "model.num_classes=0" in caught.value.remedy
    with pytest.raises(UsageError, match="model.channels_d 2 gives 2 channels at the size 32") as caught:
        complete_model(load_job(JOBS / "celeba64.yaml", {"model.channels_d": 2, "model.resolution": None}), 64, 0)
    assert "64 px" in caught.value.remedy


def test_a_key_that_only_one_method_has_is_a_difference():
    """An older run has no value for a new key, and that is not the value None."""
    assert method_differences({"a": 1}, {"a": 1, "b": None}) == ["b: absent in that run, None in this job"]
    assert method_differences({"a": 1, "c": 2}, {"a": 2}) == [
        "a: 1 in that run, 2 in this job",
        "c: 2 in that run, absent in this job",
    ]
    assert method_differences({"a": [1]}, {"a": [1]}) == []
