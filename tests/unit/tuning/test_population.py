"""A population from generation to generation, with drivers that die at any write: what is decided, once, from what."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.schema import TrainJob, TuneJob
from pipeline.errors import BudgetSpent, CorruptError, EnvironmentFault, InterruptedRun
from pipeline.runs.json_records import GenerationRecord, ScoreRecord, Trial, TrialRecord
from pipeline.runs.score_protocol import Score
from pipeline.runs.stored_run import StoredRun, StoredSweep
from pipeline.storage import file_sets, files
from pipeline.tuning.draw_points import read_records
from pipeline.tuning.population import Population, lineage_tags
from pipeline.tuning.sweep import job_of_trial
from pipeline.tuning.trial_plan import TrialResult, TrialStart
from tests.unit.runs.test_json_records import PROTOCOL

MEMBERS, ENDS = 5, [2.0, 4.0, 6.0, 8.0]


class DriverDiedError(Exception):
    pass


@dataclass(frozen=True)
class Dying(StoredSweep):
    """The folder of a sweep whose driver dies at its write number `lives`."""

    lives: list[int] = field(default_factory=lambda: [10**9])

    def _live(self) -> None:
        self.lives[0] -= 1
        if self.lives[0] < 0:
            raise DriverDiedError

    def write_trial_record(self, record: TrialRecord) -> None:
        self._live()
        super().write_trial_record(record)

    def write_generation(self, record: GenerationRecord) -> None:
        self._live()
        super().write_generation(record)


def sweep(seed: int = 3, kimg: float = 2.0, trials: int = MEMBERS, **pbt: Any) -> TuneJob:
    return TuneJob.model_validate(
        {
            "name": "s",
            "base": "base.yaml",
            "space": {"optim.lr_d": {"loguniform": [1.0e-4, 1.0e-3]}},
            "search": {"trials": trials, "seed": seed, "initial_points": [{"optim.lr_d": 5.0e-4}]},
            "schedule": {"pbt": {"interval_kimg": kimg, "fraction": 0.4, **pbt}},
        }
    )


def base_of(folder: Path) -> TrainJob:
    return TrainJob.model_validate(
        {
            "name": "base",
            "data": {"train": "/images"},
            "train": {"kimg": ENDS[-1], "batch": 16},
            "checkpoint": {"root": str(folder)},
        }
    )


def far_from_4e_4(point: dict[str, Any], kimg: float) -> float | None:
    return abs(point["optim.lr_d"] - 4.0e-4) * 1e4 / kimg


def diverges_above_6e_4(point: dict[str, Any], kimg: float) -> float | None:
    return None if point["optim.lr_d"] > 6.0e-4 else far_from_4e_4(point, kimg)


class Cluster:
    """Trains the members that a plan starts, as the trials of Ray Tune do. A member that diverges has no score."""

    def __init__(self, folder: Path, score: Callable[[dict[str, Any], float], float | None] = far_from_4e_4) -> None:
        self.stored, self.base, self.score = StoredSweep(f"{folder}/s"), base_of(folder), score
        self.trained: list[tuple[str, float]] = []  # name and end of each training

    def plan(self, job: TuneJob, lives: int = 10**9) -> Population:
        stored = Dying(self.stored.url, [lives])
        return Population(job, self.base, stored, read_records(job, stored), False)

    def drive(self, job: TuneJob, lives: int = 10**9, at_once: int = 2, backwards: bool = False) -> list[Trial]:
        """Run a driver of the sweep to its end, with so many members that train at the same time."""
        plan = self.plan(job, lives)
        running: list[TrialStart] = []
        while plan.left or running:
            while plan.left and not plan.waits and len(running) < at_once:
                running.append(plan.start("unused"))
            start = running.pop(0 if backwards else -1)
            plan.end(start.run, self.train(start))
        return plan.conclude([], {})

    def train(self, start: TrialStart) -> TrialResult:
        job = job_of_trial(self.base, start.run, {**start.point, **start.values})
        run, kimg = StoredRun.of(job), job.train.kimg
        if job.init is not None:
            source = StoredRun(job.init.source.rpartition("/checkpoints/")[0]).checkpoint(files.name(job.init.source))
            assert source.is_complete()
            assert (job.init.optimizers, job.init.keep_position) == (True, True)
            assert 1000 * kimg > source.images
        value = self.score(start.point, kimg)
        if value is None:
            return TrialResult(None, kimg, "training diverged")
        if not run.scores() or run.scores()[-1].images < 1000 * kimg:
            self.trained.append((start.run, kimg))
            commit(run, kimg, value)
        return TrialResult(run.scores()[-1].score.value, kimg)

    def generations(self) -> list[GenerationRecord]:
        names = sorted(Path(self.stored.url, "generations").iterdir())
        return [GenerationRecord.parse(path.read_bytes(), str(path)) for path in names]

    def decisions(self) -> list[Any]:
        """All decisions, without the names of the runs: for each member its point and the member that was cloned."""
        records = self.generations()
        index = {member.name: i for record in records for i, member in enumerate(record.members)}
        return [
            [(m.point, m.parent and (index[m.parent.run], m.parent.generation)) for m in record.members]
            for record in records
        ]


def commit(run: StoredRun, kimg: float, value: float) -> None:
    """Store a checkpoint at a position, and its score."""
    images = int(1000 * kimg)
    name = f"{images:012d}-{zlib.crc32(run.name.encode()):08x}"
    with files.temporary_folder("checkpoint") as local:
        (local / "state").write_text(run.name)
        file_sets.upload_set(local, run.checkpoint(name).url)
    score = Score.of(PROTOCOL, "fd_x", False, {"fd_x": value}, {})
    run.write_score(ScoreRecord(checkpoint=name, images=images, score=score, seconds=1.0, time_ms=images))


# --- an undisturbed sweep --------------------------------------------------------------------------------------------


def test_the_population_comes_near_the_best_point_and_its_lineage_is_recorded(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    trials = cluster.drive(sweep())
    generations = cluster.generations()
    assert [len(record.members) for record in generations] == [MEMBERS] * len(ENDS)
    assert generations[0].members[0].point == {"optim.lr_d": 5.0e-4}, "an initial point founds a member"
    assert len({member.point["optim.lr_d"] for member in generations[0].members}) == MEMBERS

    assert len(trials) == MEMBERS + 2 * (len(ENDS) - 1)
    finished = [trial for trial in trials if trial.outcome == "finished"]
    assert {trial.name for trial in finished} == {member.name for member in generations[-1].members}
    assert all(trial.kimg == ENDS[-1] for trial in finished)
    assert {trial.outcome for trial in trials} == {"finished", "stopped early"}

    def spread(record: GenerationRecord) -> float:
        return sum(far_from_4e_4(member.point, 1.0) or 0.0 for member in record.members)

    assert spread(generations[-1]) < spread(generations[0])
    clones = [trial for trial in trials if trial.parent]
    for trial in clones:
        assert trial.parent is not None
        assert cluster.stored.trial(trial.parent.run).checkpoint(trial.parent.checkpoint).is_complete()
        assert lineage_tags(trial.parent) == {
            "pbt.generation": str(trial.parent.generation),
            "pbt.parent_run": trial.parent.run,
            "pbt.parent_checkpoint": trial.parent.checkpoint,
        }
        assert f"-g{trial.parent.generation}m" in trial.name
    assert len(clones) == 2 * (len(ENDS) - 1)
    assert lineage_tags(None) == {"pbt.generation": "0"}


def test_a_clone_starts_at_the_end_of_a_generation_while_its_parent_goes_on_and_keeps_the_checkpoint(
    tmp_path: Path,
) -> None:
    cluster = Cluster(tmp_path)
    plan = cluster.plan(sweep())
    for _ in range(MEMBERS):
        start = plan.start("unused")
        assert start.values == {"train.kimg": ENDS[0]}
        plan.end(start.run, cluster.train(start))
    starts = [plan.start("unused") for _ in range(MEMBERS)]
    assert plan.waits
    sources = {start.values["init"]["source"] for start in starts if "init" in start.values}
    kept = {cluster.stored.trial(start.run).checkpoint(name).url for start in starts for name in start.kept}
    assert kept == sources
    assert all(start.values["train.kimg"] == ENDS[1] for start in starts)
    for start in starts:
        plan.end(start.run, cluster.train(start))
    survivor = next(start for start in starts if start.kept)
    later = [plan.start("unused") for _ in range(MEMBERS)]
    assert all(start.kept != survivor.kept for start in later if start.run == survivor.run), "only as long as needed"


def test_the_decisions_do_not_depend_on_the_order_in_which_members_train(tmp_path: Path) -> None:
    one, many, back = (Cluster(tmp_path / name) for name in ("one", "many", "back"))
    one.drive(sweep(), at_once=1)
    many.drive(sweep(), at_once=5)
    back.drive(sweep(), at_once=3, backwards=True)
    assert one.decisions() == many.decisions() == back.decisions()
    other = Cluster(tmp_path / "other")
    other.drive(sweep(seed=4))
    assert other.decisions() != one.decisions()


# --- drivers that die ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [far_from_4e_4, diverges_above_6e_4])
def test_a_sweep_whose_driver_dies_at_any_write_decides_once_and_trains_nothing_twice(
    tmp_path: Path, score: Callable[[dict[str, Any], float], float | None]
) -> None:
    undisturbed = Cluster(tmp_path / "undisturbed", score)
    undisturbed.drive(sweep())
    for lives in range(200):
        cluster = Cluster(tmp_path / f"{lives}", score)
        try:
            cluster.drive(sweep(), lives)
        except DriverDiedError:
            pass
        else:
            break  # it lived to the end: every write has been the last one
        before = cluster.generations() if Path(cluster.stored.url, "generations").exists() else []
        cluster.drive(sweep())
        assert cluster.generations()[: len(before)] == before, "a decision that is recorded stays"
        assert cluster.decisions() == undisturbed.decisions(), lives
        assert len(cluster.trained) == len(set(cluster.trained)) == len(undisturbed.trained)
        names = {member.name for record in cluster.generations() for member in record.members}
        assert {record.trial.name for record in cluster.stored.trial_records()} == names
        shutil.rmtree(tmp_path / f"{lives}")
    assert lives > 3 * MEMBERS


def test_a_sweep_that_has_ended_starts_nothing_again(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    trials = cluster.drive(sweep())
    trained = list(cluster.trained)
    plan = cluster.plan(sweep())
    assert plan.left == 0
    assert plan.line == "generation 4 of 4, which 5 of 5 members have ended"
    assert plan.conclude([], {}) == trials
    assert cluster.trained == trained


def test_a_resumed_generation_starts_only_its_members_that_have_not_ended(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    first = cluster.plan(sweep())
    assert first.line is None
    starts = [first.start("unused") for _ in range(3)]
    first.end(starts[1].run, cluster.train(starts[1]))
    second = cluster.plan(sweep())
    assert second.line == "generation 1 of 4, which 1 of 5 members have ended"
    resumed = [second.start("unused") for _ in range(MEMBERS - 1)]
    assert second.waits
    assert starts[1] not in resumed
    assert resumed[:2] == [starts[0], starts[2]]
    numbers = [record.number for record in cluster.stored.trial_records()]
    assert numbers == list(range(MEMBERS))


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_members_that_diverge_are_replaced_and_never_resumed(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, diverges_above_6e_4)
    trials = cluster.drive(sweep())
    failed = {trial.name: trial for trial in trials if trial.outcome == "training diverged"}
    assert failed
    assert all(trial.score is None for trial in failed.values())
    generations = cluster.generations()
    for number, record in enumerate(generations[1:], 1):
        names = {member.name for member in record.members}
        over = {name for name, trial in failed.items() if trial.kimg <= ENDS[number - 1]}
        assert not names & over
        assert not {member.parent.run for member in record.members if member.parent} & failed.keys()


def test_a_population_without_a_score_ends(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, lambda point, kimg: None)
    trials = cluster.drive(sweep())
    assert [trial.outcome for trial in trials] == ["training diverged"] * MEMBERS
    assert cluster.plan(sweep()).left == 0
    assert len(cluster.generations()) == 1


def test_a_member_that_cannot_go_on_stops_the_sweep_before_the_next_decision(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    plan = cluster.plan(sweep())
    starts = [plan.start("unused") for _ in range(2)]
    plan.give_up(starts[0].run)
    assert plan.left == 0
    plan.end(starts[1].run, cluster.train(starts[1]))
    with pytest.raises(EnvironmentFault, match=rf"{starts[0].run} of s failed.*no route to host"):
        plan.conclude([], {starts[0].run: TrialResult(None, 0.0, "no route to host")})
    assert len(cluster.generations()) == 1
    with pytest.raises(InterruptedRun, match="in generation 1 of 4; 4 of its members"):
        plan.conclude([], {})
    cluster.drive(sweep())
    undisturbed = Cluster(tmp_path / "undisturbed")
    undisturbed.drive(sweep())
    assert cluster.decisions() == undisturbed.decisions()


def test_a_member_that_has_spent_its_budget_stops_the_sweep_and_goes_on_with_a_larger_one(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    plan = cluster.plan(sweep())
    starts = [plan.start("unused") for _ in range(2)]
    plan.end(starts[0].run, TrialResult(None, 0.0))
    assert plan.left == 0
    plan.end(starts[1].run, cluster.train(starts[1]))
    with pytest.raises(BudgetSpent, match="1 of 5 members of s have spent their budget"):
        plan.conclude([], {})
    assert len(cluster.generations()) == 1
    cluster.drive(sweep())
    undisturbed = Cluster(tmp_path / "undisturbed")
    undisturbed.drive(sweep())
    assert cluster.decisions() == undisturbed.decisions()


def test_a_checkpoint_that_is_not_complete_is_not_cloned(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    plan = cluster.plan(sweep())
    for _ in range(MEMBERS - 1):
        start = plan.start("unused")
        plan.end(start.run, cluster.train(start))
    start = plan.start("unused")
    result = cluster.train(start)
    for record in cluster.stored.trial_records():
        run = cluster.stored.trial(record.trial.name)
        for checkpoint in run.checkpoints():
            file_sets.remove_set(checkpoint.url)
    with pytest.raises(CorruptError, match="no complete checkpoint with a score at 2 kimg"):
        plan.end(start.run, result)
    assert len(cluster.generations()) == 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda r: r["members"].pop(), "has 4 members, not 5"),
        (
            lambda r: r["members"][0]["point"].update({"evaluate.extractor": "/x.pt2"}),
            "evaluate.extractor is not a key",
        ),
        (lambda r: r["members"][0]["point"].update({"optim.lr_d": 2.0}), "2.0 is not a number from"),
        (lambda r: r["members"][0].update(name="../x"), "is not a GenerationRecord: members.0.name"),
        (lambda r: r.update(number=1), "is the record of another generation: 1"),
    ],
)
def test_a_foreign_generation_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], problem: str
) -> None:
    cluster = Cluster(tmp_path)
    cluster.plan(sweep())
    path = Path(cluster.stored.generation_url(0))
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(CorruptError) as caught:
        cluster.plan(sweep())
    assert problem in caught.value.message
