"""The population of a sweep with population-based training: what its members train, from generation to generation.

A member trains its run for one generation at a time. Where it goes on, the run of the same name resumes, and its
sequence of images and steps is that of a run without interruption. A clone is a new run, whose first checkpoint is the
parent's checkpoint at the end of a generation.

The folder of the sweep is the only state. The record of a generation is the decision about its members. It is written
before one of them trains, and a generation that has a record is never decided again.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pipeline.config.schema import TrainJob, TuneJob
from pipeline.errors import BudgetSpent, CorruptError, EnvironmentFault, InterruptedRun
from pipeline.runs.json_records import (
    FINISHED,
    RUNNING,
    STOPPED_EARLY,
    GenerationRecord,
    Lineage,
    Member,
    Trial,
    TrialRecord,
)
from pipeline.runs.stored_run import StoredSweep
from pipeline.tuning.draw_points import checked_point, start
from pipeline.tuning.exploit_explore import clones, generation_ends
from pipeline.tuning.trial_plan import TrialResult, TrialStart, with_result

_REMEDY = "start over with --fresh, or give the sweep another name (name=…)"


class Population:
    """The plan of a sweep with `schedule.pbt`. It finds the newest generation in storage, or founds a population.

    Args:
        sweep: The sweep job.
        base: Base job of the members.
        stored: Folder of the sweep.
        records: Records of the trials so far.
        higher_is_better: Direction of the score.

    Raises CorruptError, EnvironmentFault.
    """

    def __init__(
        self,
        sweep: TuneJob,
        base: TrainJob,
        stored: StoredSweep,
        records: Sequence[TrialRecord],
        higher_is_better: bool,
    ) -> None:
        assert sweep.pbt is not None
        self._sweep, self._base, self._stored, self._higher_is_better = sweep, base, stored, higher_is_better
        self._ends = generation_ends(base.train.kimg, sweep.pbt.interval_kimg)
        self._records = {record.trial.name: record for record in records}
        self._extinct = False  # whether no member has a score, so that there is nothing to clone
        self._given_up = False  # whether a member cannot end the generation under this driver
        self._spent: list[str] = []  # names of the members that have spent their budget
        self._to_start: deque[Member] = deque()
        self._open: set[str] = set()  # names of the members that have not ended the generation
        known = self._known_generation()
        self._resumes = known is not None
        self._generation = known or self._found()
        self._begin_generation()

    # --- the plan of the searcher ---

    @property
    def left(self) -> int:
        if self._extinct or self._given_up:
            return 0
        later = len(self._ends) - 1 - self._generation.number
        return len(self._to_start) + later * len(self._generation.members)

    @property
    def waits(self) -> bool:
        return not self._to_start

    @property
    def line(self) -> str | None:
        if not self._resumes:
            return None
        members = len(self._generation.members)
        return (
            f"generation {self._generation.number + 1} of {len(self._ends)}, which {members - len(self._open)} of "
            f"{members} members have ended"
        )

    def start(self, trial_id: str) -> TrialStart:
        member = self._to_start.popleft()
        if member.name not in self._records:
            trial = Trial(
                name=member.name, point=member.point, score=None, kimg=0.0, outcome=RUNNING, parent=member.parent
            )
            number = 1 + max((record.number for record in self._records.values()), default=-1)
            self._write(TrialRecord(number=number, ended=False, trial=trial))
        values = {"train.kimg": self._end, **start_of(self._stored, member.parent)}
        return TrialStart(
            member.name, member.point, values, lineage_tags(member.parent), self._cloned_checkpoints(member.name)
        )

    def end(self, name: str, result: TrialResult) -> None:
        """Record that a member has ended the generation. After the last one, decide the next generation.

        A member that has spent its budget stops before that, and then no further member starts.
        """
        if result.failure is None and result.kimg < self._end:
            self._spent.append(name)
            self.give_up(name)
            return
        finished = result.kimg >= self._base.train.kimg
        outcome = result.failure or (FINISHED if finished else RUNNING)
        self._write(with_result(self._records[name], result, outcome, ended=finished or result.failure is not None))
        self._open.discard(name)
        score = "no score" if result.score is None else f"score {result.score:.4g}"
        failed = f": {result.failure}" if result.failure else ""
        print(f"trial {name} has ended its generation at {result.kimg:g} kimg with {score}{failed}", flush=True)
        if not self._open:
            self._decide()

    def give_up(self, name: str) -> None:
        """Start no member any more. A decision without the score of this one would depend on the environment."""
        self._given_up = True

    def conclude(self, started: Collection[str], failed: Mapping[str, TrialResult]) -> list[Trial]:
        if failed:
            name = next(iter(failed))
            raise EnvironmentFault(
                f"the trial {name} of {self._sweep.name} failed, and the next generation depends on it: "
                f"{failed[name].failure}",
                "correct the cause, then run the same command again to resume",
            )
        if self._spent:
            raise BudgetSpent(
                f"{len(self._spent)} of {len(self._generation.members)} members of {self._sweep.name} have spent their "
                f"budget before the end of their generation at {self._end:g} kimg, and the next generation depends on "
                "them",
                "to go on, run the same command with a larger budget in the base job",
            )
        if not self._extinct and (self._open or self.left):
            raise InterruptedRun(
                f"the sweep {self._sweep.name} was stopped in generation {self._generation.number + 1} of "
                f"{len(self._ends)}; {len(self._open)} of its members had not ended it",
                "run the same command again to resume",
            )
        return [record.trial for record in sorted(self._records.values(), key=lambda record: record.number)]

    # --- generations ---

    @property
    def _end(self) -> float:
        """Position at which the generation ends, in thousands of images."""
        return self._ends[self._generation.number]

    def _known_generation(self) -> GenerationRecord | None:
        """Return the newest generation in storage; None where there is none. Raises CorruptError, EnvironmentFault."""
        record = self._stored.newest_generation()
        if record is None:
            return None
        url = self._stored.generation_url(record.number)
        if len(record.members) != self._sweep.search.trials:
            raise CorruptError(f"{url} has {len(record.members)} members, not {self._sweep.search.trials}", _REMEDY)
        if record.number >= len(self._ends):
            raise CorruptError(f"{url} is a generation after the end of the sweep at {self._ends[-1]:g} kimg", _REMEDY)
        members = [
            member.model_copy(update={"point": checked_point(self._sweep, member.point, url, _REMEDY)})
            for member in record.members
        ]
        return record.model_copy(update={"members": members})

    def _found(self) -> GenerationRecord:
        """Draw the members of generation 0, and record it. Raises EnvironmentFault."""
        founders: list[TrialRecord] = []
        for index in range(self._sweep.search.trials):
            founders.append(start(self._sweep, founders, self._name(0, index), self._higher_is_better))
        members = [Member(name=record.trial.name, point=record.trial.point, parent=None) for record in founders]
        record = GenerationRecord(number=0, members=members)
        self._stored.write_generation(record)
        return record

    def _begin_generation(self) -> None:
        """Find the members that have not ended the generation. If all have, decide the next one."""
        names = {member.name for member in self._generation.members}
        for record in self._records.values():
            if record.trial.name not in names and not record.ended:
                trial = record.trial.model_copy(update={"outcome": STOPPED_EARLY})
                self._write(record.model_copy(update={"ended": True, "trial": trial}))
        self._to_start = deque(member for member in self._generation.members if not self._has_ended(member.name))
        self._open = {member.name for member in self._to_start}
        if not self._open:
            self._decide()

    def _has_ended(self, name: str) -> bool:
        """Return whether a member has ended the generation."""
        return name in self._records and self._records[name].trial.kimg >= self._end

    def _decide(self) -> None:
        """Decide the next generation, record it and begin it. After the last generation, do nothing.

        Raises CorruptError where a checkpoint that is to be cloned is not complete, and EnvironmentFault.
        """
        number = self._generation.number + 1
        if number == len(self._ends):
            return
        members = list(self._generation.members)
        points = [member.point for member in members]
        scores = [self._records[member.name].trial.score for member in members]
        replaced = clones(self._sweep, points, scores, number, self._higher_is_better)
        if not replaced:
            self._extinct = True
            print(f"no trial of {self._sweep.name} has a score at {self._end:g} kimg, so none is cloned", flush=True)
            return
        checkpoints = {clone.parent: self._checkpoint_of(members[clone.parent].name) for clone in replaced.values()}
        lines = []
        for index, clone in replaced.items():
            old, parent = members[index], self._generation.members[clone.parent]
            lineage = Lineage(run=parent.name, checkpoint=checkpoints[clone.parent], generation=number)
            members[index] = Member(name=self._name(number, index), point=clone.point, parent=lineage)
            lines.append(f"  {members[index].name}, a clone of {parent.name}, takes the place of {old.name}")
        record = GenerationRecord(number=number, members=members)
        self._stored.write_generation(record)  # before anything is done about it
        print(f"generation {number + 1} of {len(self._ends)} begins at {self._end:g} kimg", flush=True)
        for line in lines:
            print(line, flush=True)
        self._generation = record
        self._begin_generation()

    def _checkpoint_of(self, name: str) -> str:
        """Return the name of the checkpoint of a member at the end of the generation.

        Raises CorruptError where it is not complete, EnvironmentFault.
        """
        run = self._stored.trial(name)
        for score in reversed(run.scores()):
            if score.images >= 1000 * self._end and run.checkpoint(score.checkpoint).is_complete():
                return score.checkpoint
        raise CorruptError(
            f"{run.url} has no complete checkpoint with a score at {self._end:g} kimg, and it is to be cloned", _REMEDY
        )

    def _cloned_checkpoints(self, name: str) -> tuple[str, ...]:
        """Return the names of the checkpoints of a run from which clones of this generation start."""
        parents = [member.parent for member in self._generation.members if member.parent is not None]
        return tuple(
            sorted({p.checkpoint for p in parents if p.run == name and p.generation == self._generation.number})
        )

    def _name(self, generation: int, index: int) -> str:
        """Return a name for a run. Runs of a sweep that was deleted with --fresh have other names."""
        return f"{self._sweep.name}-g{generation}m{index}-{secrets.token_hex(2)}"

    def _write(self, record: TrialRecord) -> None:
        self._records[record.trial.name] = record
        self._stored.write_trial_record(record)


def start_of(stored: StoredSweep, parent: Lineage | None) -> dict[str, Any]:
    """Return what a member starts from, as a value of its job by key; empty for a member that was not cloned."""
    if parent is None:
        return {}
    source = stored.trial(parent.run).checkpoint(parent.checkpoint).url
    return {"init": {"source": source, "optimizers": True, "keep_position": True}}


def lineage_tags(parent: Lineage | None) -> dict[str, str]:
    """Return the tags of a member's MLflow run."""
    if parent is None:
        return {"pbt.generation": "0"}
    return {
        "pbt.generation": str(parent.generation),
        "pbt.parent_run": parent.run,
        "pbt.parent_checkpoint": parent.checkpoint,
    }
