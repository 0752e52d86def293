"""Folders of runs, sweeps and studies as foreign inputs of `sagan report` and `sagan status`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import torch

from pipeline.collection.derived_tensors import NoFacts, derived
from pipeline.collection.manifest import Collection
from pipeline.config.schema import DataSection, EvaluateSection, StudyJob
from pipeline.evaluation.extractors.classifier import Classifier
from pipeline.runs.checkpoints import StoredCheckpoint, upload_checkpoint, write_checkpoint
from pipeline.runs.json_records import (
    CheckpointFacts,
    RecordedData,
    RecordedEvaluation,
    RunRecord,
    RunState,
    ScoreRecord,
    StudyRecord,
    StudySummary,
    StudyTables,
    SweepRecord,
    SweepSummary,
    SweepTrials,
    TrainSummary,
    Trial,
    Wait,
)
from pipeline.runs.owner import claim
from pipeline.runs.score_protocol import Score, ScoreProtocol
from pipeline.runs.stored_run import StoredRun, StoredStudy, StoredSweep
from pipeline.study.compare_rows import Outcome, tables_of
from sagan.config import OptimConfig
from sagan.train_state import TrainState
from tests.faults.hostile.kind import NETWORKS, Kind, Names, command, one_of, picture, refit, rewrite
from tests.faults.hostile.random_changes import changed_image, changed_json, damaged


def _change_run(folder: Path, random: Random, names: Names) -> None:
    """Change a record, a picture, a file of a checkpoint, or the name of a file or a folder."""
    run = folder / "run"
    checkpoint = one_of(run, "checkpoints/*", random)
    match random.choice(("run", "run", "summary", "score", "score", "facts", "metrics", "grid", "rename")):
        case "run":
            rewrite(run / "run.json", changed_json, random, names)
        case "summary":
            rewrite(run / "summary.json", changed_json, random, names)
        case "score":
            rewrite(one_of(run, "scores/*", random), changed_json, random, names)
        case "facts":
            rewrite(checkpoint / "checkpoint.json", changed_json, random, names)
            refit(checkpoint)
        case "metrics":
            newest = max(run.glob("checkpoints/*"))
            rewrite(newest / "metrics.jsonl", random.choice((changed_json, _damaged_text)), random, names)
            refit(newest)
        case "grid":
            rewrite(one_of(run, "grids/*", random), changed_image, random)
        case _:
            path = random.choice([checkpoint, one_of(run, "scores/*", random), one_of(run, "grids/*", random)])
            path.rename(path.with_name(random.choice(("-1-x", "abc", "\x1b[2J", "1" * 100, "0-0", " ", "é", "~.json"))))


def _damaged_text(data: bytes, random: Random, names: Names) -> bytes:
    return damaged(data, random)


def _change_sweep(folder: Path, random: Random, names: Names) -> None:
    _change(folder / "sweep" / random.choice(("run.json", "summary.json", "trials.json", "plane.png")), random, names)


def _change_study(folder: Path, random: Random, names: Names) -> None:
    name = random.choice(("run.json", "summary.json", "tables.json", "tables.json", "curves.png"))
    _change(folder / "studies" / "study" / name, random, names)


def _change(path: Path, random: Random, names: Names) -> None:
    if path.suffix == ".png":
        rewrite(path, changed_image, random)
    else:
        rewrite(path, changed_json, random, names)


def _change_status(folder: Path, random: Random, names: Names) -> None:
    """Change what a driver said of the run, or any other record that `sagan status` reads."""
    if random.random() < 0.5:
        rewrite(folder / "run" / "status.json", changed_json, random, names)
    elif random.random() < 0.5:
        rewrite(one_of(folder / "run", "owners/*", random), changed_json, random, names)
    else:
        _change_run(folder, random, names)


def _is_page(out: Path, printed: str) -> bool:
    page = (out / "report.html").read_text()
    return page.rstrip().endswith("</html>") and "<script>alert" not in page and 'href="javascript' not in page


def _is_status(out: Path, printed: str) -> bool:
    return "state" in printed


def build(root: Path) -> None:
    """Write a run with two scored checkpoints, its collection with a classifier, a sweep and a study below `root`."""
    folder = root / "runs"
    collection = Collection.open(str(shutil.copytree(root / "collection-png", folder / "collection")))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tensors = Classifier(32, 2).eval().state_dict()
    facts = {"resolution": 32, "classes": 2, "seed": 0, "heldout_accuracy": 0.5}
    expected = {name: tensor.to("meta") for name, tensor in tensors.items()}
    _, _, digest = derived(collection, "classifier-v1-seed0", lambda: (tensors, facts), expected, NoFacts)
    protocol = ScoreProtocol(
        extractor="classifier", extractor_digest=digest, resize="none", reference_digest=collection.digest,
        split="train", samples=4, seed=0, weights="ema", batch_norm="running",
    )  # fmt: skip
    run = StoredRun(str(folder / "run"))
    section = EvaluateSection(extractor="classifier", samples=4, standing_images=None)
    record = RunRecord(
        name="run", method={"data.collection": collection.digest, "optim.lr_d": 4e-4}, mlflow_run_id="0",
        data=RecordedData.of(DataSection(train=collection.url)), evaluate=RecordedEvaluation.of(section),
    )  # fmt: skip
    run.write_record(record)
    scores = []
    for images in (1000, 2000):
        checkpoint = _checkpoint(run, images, collection)
        score = Score.of(protocol, "fd_classifier", False, {"fd_classifier": 5000.0 / images})
        scores.append(score)
        run.write_score(
            ScoreRecord(checkpoint=checkpoint.name, images=images, score=score, seconds=1.0, time_ms=images)
        )
        (folder / "run" / "grids").mkdir(exist_ok=True)
        (folder / "run" / "grids" / f"{checkpoint.name}.png").write_bytes(picture(images, 64))
    run.write_state(
        RunState(
            owner=1,
            state="training",
            images=2000,
            kimg=4.0,
            device_hours=1.5,
            device_s_per_image=2.0,
            price_per_device_hour=3.0,
            waits=[Wait(who="the run", what="2 GPUs", until="it starts when they are free", since_s=1.0)],
            last_error="a disk is full",
            last_error_s=1.0,
            time_s=2.0,
        )
    )
    claim(run.owners_url, print).release()
    summary: dict[str, Any] = {"mlflow_run_id": "0", "score": scores[-1], "final": scores[0], "grid": "grid.png"}
    run.write_summary(
        TrainSummary(
            name="run",
            images=2000,
            seconds=1.0,
            images_per_s=2000.0,
            resumed_from=None,
            restarts=0,
            images_lost=0,
            registered={"model": "run", "version": 1, "alias": "champion"},
            **summary,
        )
    )
    sweep = StoredSweep(str(folder / "sweep"))
    sweep.write_record(SweepRecord(name="sweep", mlflow_run_id="0", method={"space.optim.lr_d": {"choice": [1e-4]}}))
    trials = [
        Trial(name="sweep-a", point={"optim.lr_d": 1e-3}, score=None, kimg=1, outcome="diverged"),
        Trial(name="run", point={"optim.lr_d": 4e-4}, score=2.5, kimg=2, outcome="finished"),
    ]
    sweep.write_trials(SweepTrials(trials=trials))
    plane = folder / "sweep" / "plane.png"
    plane.write_bytes(picture(5, 64))
    sweep.write_summary(
        SweepSummary(name="sweep", trials=2, stopped_early=0, best=trials[1], picture=str(plane), **summary)
    )
    _build_study(StoredStudy(str(folder / "studies" / "study")), scores)


def _build_study(study: StoredStudy, scores: list[Score]) -> None:
    published = {"metric": "fd_classifier", "value": 3.0, "source": "a paper", "protocol": "theirs"}
    job = StudyJob(
        name="study", base="base.yaml", seeds=[0, 1], rows={"none": {"published": [published]}, "more": {}},
        compare={"metrics": ["fd_classifier"], "reference": "none"},
    )  # fmt: skip
    outcomes = [Outcome(row, seed, score) for row in job.rows for seed, score in enumerate(scores)]
    names = ["run", "study-more-2", "study-more-3"]
    study.write_record(
        StudyRecord(
            name="study", mlflow_run_id="0", runs=names, diverged={names[1]: "at 1.0 kimg"},
            init_versions={"models:/base@champion": "3"}, tuned={"more": {"optim.lr_d": 4e-4}},
        )
    )  # fmt: skip
    study.write_tables(StudyTables(tables=tables_of(job, outcomes, {"fd_classifier": False})))
    Path(study.picture_url).write_bytes(picture(7, 64))
    study.write_summary(
        StudySummary(
            name="study", runs=4, diverged=0, images=8000, shown="run", mlflow_run_id="0", table=study.table_url,
            picture=study.picture_url, tuned={"more": {"optim.lr_d": 4e-4}},
        )
    )  # fmt: skip


def _checkpoint(run: StoredRun, images: int, collection: Collection) -> StoredCheckpoint:
    state = TrainState(NETWORKS, OptimConfig(), images)
    state.images = images
    local = Path(run.url).parent / f"local-{images}"
    local.mkdir()
    point = {"step": images, "time_ms": 0, "metrics": {"loss_d": 1.5, "gamma_g": 0.25}}
    metrics = f"{json.dumps(point)}\n".encode()
    facts = CheckpointFacts(
        images=images, train_seconds=1.0, to_score=True, collection_digest=collection.digest,
        class_names=collection.class_names, method_digest="ab" * 32, git_commit="unknown",
    )  # fmt: skip
    checkpoint = run.checkpoint(write_checkpoint(local, state, metrics, facts))
    upload_checkpoint(local, checkpoint)
    shutil.rmtree(local)
    return checkpoint


_ROW, _OPTIONS = "runs, sweeps and studies", "--samples 4 --reference IN/collection"
KINDS = {
    "run": Kind(_ROW, 8, "runs", _change_run, command(f"report IN/run {_OPTIONS}"), _is_page),
    "status of a run": Kind(_ROW, 4, "runs", _change_status, command("status IN/run"), _is_status),
    "status of a sweep": Kind(_ROW, 1, "runs", _change_sweep, command("status IN/sweep"), _is_status),
    "sweep": Kind(_ROW, 3, "runs", _change_sweep, command(f"report IN/sweep {_OPTIONS}"), _is_page),
    "status of a study": Kind(_ROW, 1, "runs", _change_study, command("status IN/studies/study"), _is_status),
    "study": Kind(_ROW, 3, "runs", _change_study, command(f"report IN/studies/study {_OPTIONS}"), _is_page),
}
