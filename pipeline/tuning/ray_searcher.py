"""The searcher of a sweep for Ray Tune. It takes its trials from the records in storage, and records every trial."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ray.tune.search import Searcher

from pipeline.config.schema import TrainJob, TuneJob
from pipeline.errors import EnvironmentFault, InterruptedRun, printable, shown_url
from pipeline.runs.json_records import FINISHED, STOPPED_EARLY, Trial, TrialRecord
from pipeline.runs.stored_run import StoredSweep
from pipeline.tuning.draw_points import start, to_resume, to_start


class RecordedSearcher(Searcher):
    """Gives Ray Tune the trials that the sweep still runs, and records when each of them starts and ends.

    Args:
        sweep: The sweep job.
        base: Base job of the trials.
        stored: Folder of the sweep.
        records: Records of the trials so far.
        higher_is_better: Direction of the score.
        may_start: Returns whether another trial may start beside a number of running trials.
    """

    def __init__(
        self,
        sweep: TuneJob,
        base: TrainJob,
        stored: StoredSweep,
        records: Sequence[TrialRecord],
        higher_is_better: bool,
        may_start: Callable[[int], bool],
    ) -> None:
        super().__init__()
        self._sweep, self._base, self._stored, self._higher_is_better = sweep, base, stored, higher_is_better
        self._may_start = may_start
        self._records = {record.trial.name: record for record in records}
        self._to_resume = deque(to_resume(sweep, records))
        self._names: dict[str, str] = {}  # names of the runs of this driver's trials, by the id that Ray Tune gave them
        self._running: set[str] = set()  # these ids
        self._fault: EnvironmentFault | None = None

    def suggest(self, trial_id: str) -> Any:
        """Return what a trial needs: the name of its run and its point.

        Returns None where a trial must wait; Ray Tune then asks again. Raises EnvironmentFault.
        """
        if self._fault is not None:
            raise self._fault
        records = list(self._records.values())
        if not self._to_resume and not to_start(self._sweep, records):
            return Searcher.FINISHED
        if not self._may_start(len(self._running)):
            return None
        if self._to_resume:
            record = self._to_resume.popleft()
        else:
            record = start(self._sweep, records, f"{self._sweep.name}-{trial_id}", self._higher_is_better)
            self._write(record)  # before the trial starts, since its run would have no owner without a record
        self._names[trial_id] = record.trial.name
        self._running.add(trial_id)
        print(f"trial {record.trial.name} starts at {record.trial.point}", flush=True)
        return {"run": record.trial.name, "point": record.trial.point}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record the end of a trial. Ray Tune also calls this where a trial failed or was interrupted."""
        self._running.discard(trial_id)
        if error or not result or not result.get("done"):
            return
        kimg = float(result.get("kimg", 0.0))
        outcome = result.get("failure") or (FINISHED if kimg >= self._base.train.kimg else STOPPED_EARLY)
        record = self._records[self._names[trial_id]]
        try:
            self._write(_with(record, ended=True, score=result.get("score"), kimg=kimg, outcome=outcome))
        except EnvironmentFault as fault:
            self._fault = fault  # Ray Tune would take an exception for a failure of the trial
            return
        print(f"trial {record.trial.name} has ended at {kimg:g} kimg: {outcome}", flush=True)

    def conclude(self, results: Any) -> list[Trial]:
        """Return the trials of the sweep, given the results of Ray Tune.

        Raises EnvironmentFault where a trial could not be recorded, and InterruptedRun where a trial has no end.
        """
        if self._fault is not None:
            raise self._fault
        failed = set()
        for result in results:
            if result.error is not None:
                record = self._records[self._names[result.metrics["trial_id"]]]
                reason = printable(shown_url(str(result.error).strip().splitlines()[-1]))
                score, kimg = result.metrics.get("score"), float(result.metrics.get("kimg", 0.0))
                self._write(_with(record, ended=False, score=score, kimg=kimg, outcome=f"failed: {reason}"))
                failed.add(record.trial.name)
        mine = [self._records[name] for name in self._names.values()]
        if running := [record for record in mine if not record.ended and record.trial.name not in failed]:
            raise InterruptedRun(
                f"the sweep {self._sweep.name} was stopped; {len(running)} of its trials had not ended",
                "run the same command again to resume",
            )
        records = sorted(self._records.values(), key=lambda record: record.number)
        return [record.trial for record in records if record.ended or record.trial.name in failed]

    def save(self, checkpoint_path: str) -> None:
        """Write nothing. Ray Tune's own state is not used."""

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing. Ray Tune pickles its searcher at the start, and the copy is never read."""
        return {}

    def _write(self, record: TrialRecord) -> None:
        self._records[record.trial.name] = record
        self._stored.write_trial_record(record)


def _with(record: TrialRecord, *, ended: bool, **changes: Any) -> TrialRecord:
    return record.model_copy(update={"ended": ended, "trial": record.trial.model_copy(update=changes)})
