"""What scores beside training cost it: `python -m tests.benchmarks.beside [--json FILE]`.

One run of the digits' job: a worker of one thread, and an evaluation of one thread on another CPU. Scores come at an
interval that is longer than taking one, so the run trains with evaluation beside it and without by turns. Rates are
those of the steps that lie wholly in either, compared round by round. What holds steps up is what the worker logs: the
hand-over of a checkpoint, and waiting for a score. A short run for whose evaluation there is no room says what that
wait is in line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pipeline
from tests.benchmarks._interleaved import median_ratio

JOB = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"
BATCH = 32
INTERVAL = 3200  # images from score to score
SAMPLES = 6000
IN_LINE_SCORES = 4


@dataclass(frozen=True)
class Step:
    """From one point of the log to the next. Times in seconds."""

    began: float
    ended: float
    handed_over: float
    """Of it, for a checkpoint."""
    waited: float
    """Of it, for a score."""

    @property
    def seconds(self) -> float:
        return self.ended - self.began - self.handed_over - self.waited


@dataclass(frozen=True)
class Round:
    """From one checkpoint that is scored to the next."""

    beside: list[Step]
    """While the score was taken."""
    off: list[Step]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the figures as one object")
    arguments = parser.parse_args()
    start = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # where runs leave their summaries
        # the first round trains the classifier, and the last two scores end the last round and the run
        run = train(Path(folder), "beside", scores=arguments.rounds + 3, cpus=1)
        rounds = rounds_of(run)[1:]
        in_line = steps_of(train(Path(folder), "in-line", scores=IN_LINE_SCORES, cpus=1 + (os.cpu_count() or 1)))
        os.chdir(start)
    beside, off = [s for r in rounds for s in r.beside], [s for r in rounds for s in r.off]
    ratio = median_ratio([mean(r.off) for r in rounds], [mean(r.beside) for r in rounds])
    figures = {
        "images_per_s_beside_over_off": round(ratio, 4),
        "share_of_time_beside": round(total(beside) / total(beside + off), 3),
        "longest_step_beside_s": round(max(s.seconds for s in beside), 3),
        "longest_step_off_s": round(max(s.seconds for s in off), 3),
        "hand_over_s": round(statistics.median(s.handed_over for s in beside if s.handed_over), 3),
        "waited_for_score_beside_s": round(max(s.waited for s in beside + off), 3),
        "waited_for_score_in_line_s": round(statistics.median(s.waited for s in in_line if s.waited), 3),
    }
    print(f"{len(rounds)} rounds, {BATCH * len(beside + off) / total(beside + off):.1f} images/s")
    for name, figure in figures.items():
        print(f"{figure:8}  {name}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


def mean(steps: list[Step]) -> dict[str, float]:
    return {"seconds": total(steps) / len(steps)}


def total(steps: list[Step]) -> float:
    return sum(step.seconds for step in steps)


def train(folder: Path, name: str, *, scores: int, cpus: int) -> Path:
    """A run on one worker that logs every step and asks for `cpus` to evaluate on; returns its folder."""
    overrides = {
        "name": name,
        "data.train": folder / "digits",
        "data.threads": 1,
        "train.workers": 1,
        "train.batch": BATCH,
        "train.kimg": scores * INTERVAL / 1000,
        "train.log_kimg": BATCH / 1000,
        "checkpoint.root": folder / "runs",
        "checkpoint.kimg": INTERVAL / 1000,
        "evaluate.kimg": INTERVAL / 1000,
        "evaluate.samples": SAMPLES,
        "evaluate.cpus": cpus,
        "track.register": False,
    }
    pipeline.run_job(JOB, {key: str(value) if isinstance(value, Path) else value for key, value in overrides.items()})
    return folder / "runs" / name


def steps_of(run: Path) -> list[Step]:
    newest = max((run / "checkpoints").iterdir())
    points = [json.loads(line) for line in (newest / "metrics.jsonl").read_text().splitlines()]
    steps = []
    for before, point in pairwise(points):
        metrics = point["metrics"]
        seconds = (point["step"] - before["step"]) / metrics["images_per_s"]
        held_up = [metrics[share] * seconds for share in ("checkpoint_share", "evaluation_share")]
        steps.append(Step(before["time_ms"] / 1000, point["time_ms"] / 1000, *held_up))
    return steps


def rounds_of(run: Path) -> list[Round]:
    """Evaluation is beside training from the hand-over of a checkpoint until its score is on record."""
    steps = steps_of(run)
    handed_over = [step.began for step in steps if step.handed_over]
    recorded = sorted(path.stat().st_mtime for path in (run / "scores").iterdir())
    rounds = []
    for begin, score, end in zip(handed_over, recorded, handed_over[1:], strict=False):
        within = [step for step in steps if begin <= step.began and step.ended <= end]
        rounds.append(Round([s for s in within if s.ended <= score], [s for s in within if s.began >= score]))
    return rounds


if __name__ == "__main__":
    main()
