"""The searcher of a sweep for Ray Tune. It takes its trials from the plan of the sweep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ray.tune.search import Searcher

from pipeline.errors import CorruptError, EnvironmentFault, printable, shown_url
from pipeline.runs.json_records import Trial
from pipeline.tuning.trial_plan import TrialPlan, TrialResult


class RecordedSearcher(Searcher):
    """Gives Ray Tune the trials of a plan, and tells the plan when each of them ends.

    Args:
        plan: Trials that the sweep still runs.
        may_start: Returns whether another trial may start beside a number of running trials.
    """

    def __init__(self, plan: TrialPlan, may_start: Callable[[int], bool]) -> None:
        super().__init__()
        self._plan, self._may_start = plan, may_start
        self._names: dict[str, str] = {}  # names of the runs of this driver's trials, by the id that Ray Tune gave them
        self._running: set[str] = set()  # these ids
        self._fault: EnvironmentFault | CorruptError | None = None

    def suggest(self, trial_id: str) -> Any:
        """Return the values of a `TrialStart` by name.

        Returns None where a trial must wait; Ray Tune then asks again. Raises EnvironmentFault, CorruptError.
        """
        if self._fault is not None:
            raise self._fault
        if not self._plan.left:
            return Searcher.FINISHED
        if self._plan.waits or not self._may_start(len(self._running)):
            return None
        start = self._plan.start(trial_id)
        self._names[trial_id] = start.run
        self._running.add(trial_id)
        print(f"trial {start.run} starts at {start.point}", flush=True)
        return asdict(start)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record the end of a trial. Ray Tune also calls this where a trial failed or was interrupted."""
        self._running.discard(trial_id)
        name = self._names[trial_id]
        if error or not result or not result.get("done"):
            self._plan.give_up(name)
            return
        last = TrialResult(result.get("score"), float(result.get("kimg", 0.0)), result.get("failure"))
        try:
            self._plan.end(name, last)
        except (EnvironmentFault, CorruptError) as fault:
            self._fault = fault  # Ray Tune would take an exception for a failure of the trial

    def conclude(self, results: Any) -> list[Trial]:
        """Return the trials of the sweep, given the results of Ray Tune.

        Raises EnvironmentFault and CorruptError where a trial could not be recorded, and what the plan raises.
        """
        if self._fault is not None:
            raise self._fault
        failed = {}
        for result in results:
            if result.error is not None:
                reason = printable(shown_url(_reason(result.error)))
                score, kimg = result.metrics.get("score"), float(result.metrics.get("kimg", 0.0))
                failed[self._names[result.metrics["trial_id"]]] = TrialResult(score, kimg, reason)
        return self._plan.conclude(self._names.values(), failed)

    def save(self, checkpoint_path: str) -> None:
        """Write nothing. Ray Tune's own state is not used."""

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing. Ray Tune pickles its searcher at the start, and the copy is never read."""
        return {}


def _reason(error: Exception) -> str:
    """Return why a trial failed, as one line. Ray Tune gives the text of the trial's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if not line.startswith("→")), type(error).__name__)
