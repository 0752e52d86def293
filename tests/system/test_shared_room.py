"""What a trial or a score does where others use the cluster: it waits for room, and gives it back."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train import RunConfig, ScalingConfig
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from pipeline.compute.resources import end_actor, placement_groups
from pipeline.compute.tasks import BackgroundTask
from pipeline.config.job_file import parse_job
from pipeline.config.schema import TrainJob
from pipeline.errors import ProcessDied
from pipeline.training import score_while_training
from pipeline.training.ray_trainer import Trainer
from pipeline.training.score_while_training import Scoring, ScoringBeside
from pipeline.training.shared_types import Evaluation
from pipeline.training.status.messages import Message, Noted, Waits, WentOn
from pipeline.tuning.trial_room import TrialNeeds, TrialRoom

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("ray")]


@pytest.fixture(autouse=True, scope="module")
def _three_cpus() -> Iterator[None]:
    ray.init(num_cpus=3, include_dashboard=False)
    yield
    ray.shutdown()


class Controller:
    """Stands in for an actor that runs the workers of a trial."""

    def make(self, cpus: int) -> PlacementGroup:
        """Make a placement group that holds `cpus` CPUs, or waits for them."""
        self._group = placement_group([{"CPU": cpus}])
        return self._group


def states(*groups: PlacementGroup) -> list[str]:
    return [placement_group_table(group)["state"] for group in groups]


def test_a_trial_gives_its_room_back_as_soon_as_its_process_has_died_and_another_one_starts() -> None:
    """Ray keeps the placement groups of an actor that has died. Here one holds CPUs, and the other waits for them."""
    dying, living = (ray.remote(Controller).options(num_cpus=0).remote() for _ in range(2))
    mine = placement_group([{"CPU": 1}])
    left = ray.get([dying.make.remote(1), dying.make.remote(8)])
    kept = [mine, *ray.get([living.make.remote(1), living.make.remote(8)])]
    ray.get([mine.ready(), left[0].ready(), kept[1].ready()])
    ray.kill(dying)
    while len(placement_groups().orphaned) < 2:
        time.sleep(0.05)
    assert states(*left) == ["CREATED", "PENDING"]
    assert (placement_groups().placed, placement_groups().waiting) == (1, 1)

    one_worker = TrialNeeds(1, {"CPU": 0.9, "GPU": 0.0}, [])
    with closing(TrialRoom("the sweep", one_worker, "1 worker")) as room:
        assert room.may_start(0), "the first trial waits in Ray"
        while not room.may_start(1):  # the living actor is the running trial
            time.sleep(0.05)
        assert states(*left) == ["REMOVED", "REMOVED"]
        assert states(*kept) == ["CREATED", "CREATED", "PENDING"]
        assert not room.may_start(2), "the second trial will take what is free"
    for group in kept:
        remove_placement_group(group)


def test_an_actor_that_its_driver_gives_up_ends_and_gives_its_room_back() -> None:
    for is_known in (True, False):
        actor = ray.remote(Controller).options(num_cpus=0).remote()
        group = ray.get(actor.make.remote(1))
        if not is_known:
            ray.kill(actor)
            while not placement_groups().orphaned:
                time.sleep(0.05)
        end_actor(actor._actor_id.hex() if is_known else None)
        assert states(group) == ["REMOVED"]
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(actor.make.remote(1))


def alive() -> dict[str, str]:
    """Ids of the actors that are alive, by class. Ray has one detached actor of its own for all drivers."""
    actors = [actor for actor in ray._private.state.actors().values() if actor["State"] == "ALIVE"]
    found = {actor["ActorClassName"]: str(actor["ActorID"]) for actor in actors}
    return {name: actor for name, actor in found.items() if name != "_AutoscalingCoordinatorActor"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own
def test_a_run_whose_controller_is_killed_leaves_no_actor(tmp_path: Path) -> None:
    options = RunConfig(name="run", storage_path=str(tmp_path))
    trainer = Trainer(lambda: time.sleep(10_000), scaling_config=ScalingConfig(num_workers=1), run_config=options)
    errors = list[BaseException]()

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            errors.append(error)

    training = threading.Thread(target=fit)
    training.start()
    while "RayTrainWorker" not in alive():
        assert training.is_alive(), errors
        time.sleep(0.05)
    end_actor(alive()["TrainController"])
    training.join()
    assert isinstance(errors[0], ray.exceptions.RayActorError)
    while alive():  # until the time-out of the test
        time.sleep(0.05)


def test_a_task_says_when_it_has_got_its_room() -> None:
    other = ray.remote(Controller).options(num_cpus=3).remote()
    ray.get(other.__ray_ready__.remote())
    task = BackgroundTask(pow, 2, 3, cpus=1, gpus=0)
    assert (task.has_begun(), task.is_done()) == (False, False)
    ray.kill(other)
    while not task.has_begun():
        time.sleep(0.05)
    assert task.result() == 8
    assert (task.has_begun(), task.is_done()) == (True, True)


def test_a_task_that_fails_is_done_and_raises() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        BackgroundTask(int, "x", cpus=1, gpus=0).result()
    died = BackgroundTask(os._exit, 1, cpus=1, gpus=0)
    while not died.is_done():
        time.sleep(0.05)
    with pytest.raises(ProcessDied):
        died.result()
    cancelled = BackgroundTask(time.sleep, 1000, cpus=1, gpus=0)
    while not cancelled.has_begun():
        time.sleep(0.05)
    cancelled.cancel()
    with pytest.raises(ProcessDied):
        cancelled.result()


@dataclass
class Said:
    """Stands in for the mailbox of a driver."""

    messages: list[Message] = field(default_factory=list)

    def send(self, message: Message) -> None:
        self.messages.append(message)


def no_score(*_: Any) -> Any:
    raise ValueError("no score is computed here")


def test_a_score_that_waits_for_room_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_while_training, "SAID_S", 0.1)
    values = {
        "kind": "train",
        "name": "waits",
        "data": {"train": str(tmp_path)},
        "train": {"kimg": 1, "batch": 32},
        "checkpoint": {"root": str(tmp_path)},
        "evaluate": {"cpus": 2, "timeout_s": 0.1},
    }
    job, said = parse_job(values, "waits"), Said()
    assert isinstance(job, TrainJob)
    evaluation = Evaluation(no_score, no_score, no_score, no_score, no_score)
    scores = ScoringBeside(Scoring(job, "id", said, evaluation))  # type: ignore[arg-type]
    other = ray.remote(Controller).options(num_cpus=3).remote()
    ray.get(other.__ray_ready__.remote())
    while not said.messages:
        assert scores.follow(["000000000032-00000000"])
        time.sleep(0.05)
    (wait,) = said.messages
    assert isinstance(wait, Waits)
    assert wait.what == "2 CPUs for checkpoint 000000000032-00000000"
    ray.kill(other)
    while len(said.messages) < 3:
        scores.follow(["000000000032-00000000"])
        time.sleep(0.05)
    scores.cancel()
    assert said.messages[1] == WentOn(wait.who)
    assert isinstance(said.messages[2], Noted), "the task had room, and its wait has not counted"
