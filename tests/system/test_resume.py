"""Nothing is lost: a run that is interrupted and killed ends in the same state, bit for bit, as one left alone."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from infra.local.server_process import BIN
from pipeline.runs.checkpoints import StoredCheckpoint
from pipeline.runs.status_from_folder import RunView, look_at_run
from pipeline.storage import files
from tests.document_blocks import ROOT, block
from tests.system.command_process import Driver, left_over, score_key, training_workers

MORE_THAN_THERE_ARE = 16  # CPUs of the cluster, so that nothing fits beside training

pytestmark = [pytest.mark.system, pytest.mark.xdist_group("ray")]


@pytest.fixture(scope="module")
def place(s3, ray_cluster, tmp_path_factory):
    """(folder of the commands, bucket, environment) shared by the module, so that digits are packed and judged once."""
    folder, bucket = tmp_path_factory.mktemp("training"), s3.bucket()
    env = {**s3.env, **ray_cluster.env, "SAGAN_BUCKET": bucket}
    env["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    return folder, bucket, env


def checkpoints(bucket, name):
    return files.list_names(f"{bucket}/runs/{name}/checkpoints")


def scores_of(bucket, name):
    return files.list_names(f"{bucket}/runs/{name}/scores")


def points(env, run_id, key):
    return [(m.step, m.value) for m in MlflowClient(env["MLFLOW_TRACKING_URI"]).get_metric_history(run_id, key)]


def status(env, run):
    return MlflowClient(env["MLFLOW_TRACKING_URI"]).get_run(run["mlflow_run_id"]).info.status


@pytest.fixture(scope="module")
def left_alone(place):
    """The summary of an uninterrupted run, with its whole outcome registered."""
    folder, _, env = place
    run = Driver(folder, env, name="alone")
    assert run.end() == 0, run.output
    return run.summary("alone")


def test_a_run_trains_scores_and_registers(place, left_alone):
    _, bucket, env = place
    summary = left_alone
    assert summary["images"] == 1600
    assert summary["images_per_s"] > 0
    assert summary["score"]["metric"] == "fd_classifier"
    assert summary["registered"]["model"] == "alone"
    assert summary["registered"]["alias"] == "champion"
    assert (summary["restarts"], summary["images_lost"], summary["resumed_from"]) == (0, 0, None)
    assert len(checkpoints(bucket, "alone")) == 2, "the newest two are kept, the best is one of them"
    client = MlflowClient(env["MLFLOW_TRACKING_URI"])
    version = client.get_model_version_by_alias("alone", "champion")
    assert int(version.version) == summary["registered"]["version"]
    keys = client.get_run(summary["mlflow_run_id"]).data.metrics
    assert score_key(summary["score"]) in keys
    assert {"loss_d", "loss_g", "images_per_s", "gamma_g", "gamma_d", "sigma_g", "sigma_d"} <= keys.keys()


def test_the_champion_is_pulled_and_samples_without_this_repository(place, left_alone):
    """The README's script, in an isolated interpreter that sees neither this code nor any installed copy of it."""
    folder, _, env = place
    environment = {**os.environ, **env}
    pull = [sys.executable, "-m", "pipeline", "pull", "models:/alone@champion", "runs/quickstart/champion"]
    subprocess.run(pull, cwd=folder, env=environment | {"PYTHONPATH": str(ROOT)}, check=True)
    for name in ("generator.safetensors", "config.json", "code/sagan/__init__.py", "README.md", "samples.png"):
        assert (folder / "runs" / "quickstart" / "champion" / name).exists(), name
    script = [sys.executable, "-I", "-c", block("README.md", "pulled")]
    done = subprocess.run(script, cwd=folder, capture_output=True, text=True, check=True)
    assert "torch.Size([16, 3, 32, 32])" in done.stdout


def test_a_finished_run_has_a_page(place, left_alone):
    folder, bucket, env = place
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "report",
        f"{bucket}/runs/alone",
        "--out",
        "page.html",
        "--samples=200",
    ]
    subprocess.run(command, cwd=folder, env={**os.environ, **env, "PYTHONPATH": str(ROOT)}, check=True)
    page = (folder / "page.html").read_text()
    assert score_key(left_alone["score"]) in page
    assert "generator, 16×16" in page
    assert "discriminator, 16×16" in page
    assert "<h2>Classes</h2>" in page
    assert "is left out" not in page
    assert ">device hours<" in page
    left = files.read_bytes(f"{bucket}/runs/alone/report.html").decode()  # by the run itself
    assert "<h2>Nearest real images</h2>" in left
    assert "is left out" not in left
    logged = {a.path for a in MlflowClient(env["MLFLOW_TRACKING_URI"]).list_artifacts(left_alone["mlflow_run_id"])}
    assert {"report.html", "grids.gif"} <= logged


def test_a_finished_run_shows_its_summary_again(place, left_alone):
    folder, _, env = place
    again = Driver(folder, env, name="alone")
    assert again.end() == 0, again.output
    assert "starting" not in again.output
    assert status(env, left_alone) == "FINISHED", "showing it does not open it again"
    assert left_alone["mlflow_run_id"] in again.output


def test_another_method_under_the_same_name_is_refused(place, left_alone):
    folder, _, env = place
    other = Driver(folder, env, name="alone", **{"optim.lr_d": 0.5})
    assert other.end() == 2
    assert "optim.lr_d: 0.001 in that run, 0.5 in this job" in other.output
    assert "--fresh" in other.output


def test_interrupted_killed_and_resumed_it_ends_in_the_same_state(place, left_alone):
    """SIGINT to the driver; then SIGKILL to one worker of the resumed run, which goes on by itself."""
    folder, bucket, env = place
    first = Driver(folder, env, name="tried")
    first.until("checkpoint 0")
    first.signal(signal.SIGINT)
    assert first.end() == 130, first.output
    assert status(env, files.read_json(f"{bucket}/runs/tried/run.json")) == "KILLED"
    newest = checkpoints(bucket, "tried")[-1]
    assert f"{newest} is complete" in first.output

    second = Driver(folder, env, name="tried")
    second.until(f"resumed from {newest}")
    second.until("checkpoint 0")
    os.kill(training_workers(env["RAY_ADDRESS"])[0], signal.SIGKILL)
    second.until("resumed from")
    assert second.end() == 0, second.output

    summary = second.summary("tried")
    assert summary["restarts"] == 2
    same = [name.split("/")[-1] for name in (summary["checkpoint"], left_alone["checkpoint"])]
    assert same[0] == same[1], "the name of a checkpoint holds the digest of its state"
    ours, theirs = (points(env, run["mlflow_run_id"], "loss_d") for run in (summary, left_alone))
    assert sorted(set(ours)) == sorted(ours), "no point is logged twice"
    assert dict(theirs).items() <= dict(ours).items(), "every point of the undisturbed run, and of the extra borders"


@pytest.mark.parametrize(
    ("name", "cpus", "interval"),
    [("beside", 1, 640), pytest.param("in-line", MORE_THAN_THERE_ARE, 320, marks=pytest.mark.slow)],
)
def test_scored_while_it_trains_it_ends_in_the_same_state_and_keeps_the_best(place, left_alone, name, cpus, interval):
    folder, bucket, env = place
    every = sorted({*range(interval, 1601, interval), 1600})
    ranked = {"evaluate.kimg": interval / 1000, "evaluate.score": "isc_classifier", "track.register": "false"}
    run = Driver(folder, env, name=name, **ranked, **{"evaluate.cpus": cpus, "checkpoint.keep": 1})
    assert run.end() == 0, run.output
    summary = run.summary(name)

    scored = [run.output.index(f"score at {images / 1000:.1f} kimg: isc_classifier") for images in every]
    values = dict(points(env, summary["mlflow_run_id"], score_key(summary["score"])))
    assert list(values) == list(every)
    scores = [files.read_json(f"{bucket}/runs/{name}/scores/{file}") for file in scores_of(bucket, name)]
    spans = sorted((score["time_ms"] - 1000 * score["seconds"], score["time_ms"]) for score in scores)
    assert all(end <= begin + 10 for (_, end), (begin, _) in itertools.pairwise(spans)), "one at a time, to 10 ms"

    best = max(values, key=lambda images: values[images])
    assert best != 1600, "while the newest is the best, nothing is shown of what becomes of the best"
    first, last = checkpoints(bucket, name)
    assert (StoredCheckpoint(first).images, StoredCheckpoint(last).images) == (best, 1600)
    assert last == files.name(left_alone["checkpoint"]), "its name holds the digest of the state"

    committed = [run.output.index(f"checkpoint {images:012d}") for images in every]
    waited = [share for _, share in points(env, summary["mlflow_run_id"], "evaluation_share") if share]
    if name == "beside":
        assert not waited
    else:
        assert "no room to score beside training: training waits for each score" in run.output
        assert all(score < later for score, later in zip(scored, committed[1:], strict=False))
        assert run.output.count("training waited") == len(every)
        assert len(waited) == len(every) - 1, "in the first metrics after each; after the last there are none"


@pytest.mark.slow
def test_a_run_that_has_spent_its_budget_goes_on_with_a_larger_one_to_the_same_state(place, left_alone):
    folder, bucket, env = place
    price = {"name": "limited", "resources.price_per_device_hour": 2.5, "checkpoint.kimg": 100}
    first = Driver(folder, env, **price, **{"budget.hours": 1e-6})  # it is spent when the workers have started
    assert first.end() == 4, first.output
    (stopped,) = checkpoints(bucket, "limited")
    assert f"{stopped} is complete" in first.output
    assert "a larger budget, such as budget.hours=2e-06" in first.output
    assert status(env, files.read_json(f"{bucket}/runs/limited/run.json")) == "KILLED"
    seen = look_at_run(f"{bucket}/runs/limited")
    assert isinstance(seen, RunView)
    assert seen.spending
    assert (seen.state, seen.budget_hours) == ("stopped", 1e-6)
    assert seen.spending.device_hours > 1e-6
    assert seen.spending.cost == pytest.approx(2.5 * seen.spending.device_hours)

    again = Driver(folder, env, **price, **{"budget.hours": 1e-6})
    assert again.end() == 4, again.output
    assert "starting" not in again.output, "no worker is started"

    last = Driver(folder, env, **price, **{"budget.cost": 1000})
    last.until(f"resumed from {stopped}")
    assert last.end() == 0, last.output
    summary = last.summary("limited")
    assert files.name(summary["checkpoint"]) == files.name(left_alone["checkpoint"]), "equal digests of the state"
    assert summary["device_hours"] > seen.spending.device_hours
    assert summary["cost"] == pytest.approx(2.5 * summary["device_hours"])
    tags = MlflowClient(env["MLFLOW_TRACKING_URI"]).get_run(summary["mlflow_run_id"]).data.tags
    assert float(tags["cost"]) == pytest.approx(summary["cost"], rel=0.06)


@pytest.mark.slow
def test_what_died_while_it_was_scored_in_line_is_scored_at_the_end(place, left_alone):
    """SIGKILL to the workers, of which one scores and one waits."""
    folder, bucket, env = place
    longer = {"evaluate.samples": 20_000, "evaluate.repeats": 1, "evaluate.kimg": 0.96}
    run = Driver(folder, env, name="scored-late", **longer, **{"evaluate.cpus": MORE_THAN_THERE_ARE})
    committed = run.until("checkpoint 000000000960").split()[-1]
    one, other = training_workers(env["RAY_ADDRESS"])
    os.kill(one, signal.SIGKILL)
    os.kill(other, signal.SIGKILL)
    run.until(f"resumed from {committed}")
    assert run.end() == 0, run.output
    assert "score at 1.0 kimg" not in run.output, "the worker was killed before that"
    summary = run.summary("scored-late")
    assert checkpoints(bucket, "scored-late")[-1] == files.name(left_alone["checkpoint"])
    scored = points(env, summary["mlflow_run_id"], score_key(summary["score"]))
    assert sorted(step for step, _ in scored) == [960, 1600]


@pytest.mark.slow
def test_a_killed_driver_leaves_a_run_that_one_worker_continues(place):
    """No process of the run is left, and the next driver continues it."""
    folder, bucket, env = place
    first = Driver(folder, env, name="orphan")
    first.until("checkpoint 0")
    first.signal(signal.SIGKILL)
    first.end()
    newest = checkpoints(bucket, "orphan")[-1]
    while left_over(env["RAY_ADDRESS"]):  # until the time-out of the test
        time.sleep(0.2)
    second = Driver(folder, env, name="orphan", **{"train.workers": 1})
    assert newest in second.until("resumed from")
    assert second.end() == 0, second.output
    summary = second.summary("orphan")
    steps = [step for step, _ in points(env, summary["mlflow_run_id"], "loss_d")]
    assert len(steps) == len(set(steps))
    assert max(steps) == 1600


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_at_the_next_border(place):
    folder, bucket, env = place
    run = Driver(folder, env, name="terminated", **{"checkpoint.kimg": 50})
    run.until("kimg  D")
    run.signal(signal.SIGTERM)
    assert run.end() == 130, run.output
    assert len(checkpoints(bucket, "terminated")) == 1


@pytest.mark.slow
def test_ray_job_stop_saves_a_checkpoint_and_the_same_submission_resumes(place, ray_cluster):
    folder, bucket, env = place
    variables = {name: env[name] for name in ("SAGAN_BUCKET", "MLFLOW_TRACKING_URI")}
    submit = [str(BIN / "ray"), "job", "submit", f"--runtime-env-json={json.dumps({'env_vars': variables})}", "--"]
    first = Driver(folder, env, command=submit, name="stopped", **{"checkpoint.kimg": 50})
    first.until("kimg  D")
    ray_cluster.stop_jobs()
    first.end()
    (newest,) = checkpoints(bucket, "stopped")
    assert f"{newest} is complete" in first.output
    second = Driver(folder, env, command=submit, name="stopped", **{"checkpoint.kimg": 50})
    second.until(f"resumed from {newest}")
    assert second.end() == 0, second.output


@pytest.mark.slow
def test_the_readmes_notebook_lines_run(place):
    """In a process of its own, since a job starts Ray in the process that calls it."""
    folder, _, env = place
    (folder / "jobs").symlink_to(ROOT / "jobs")
    script = [sys.executable, "-c", block("README.md", "run")]
    done = subprocess.run(script, cwd=folder, env={**os.environ, **env, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert b"'alias': 'champion'" in done.stdout


@pytest.mark.slow
def test_a_job_brings_its_code_as_a_working_dir(place, tmp_path):
    """`ray job submit --working-dir . -- jobs/quickstart.yaml`, from a checkout that the cluster has never seen."""
    folder, _, env = place
    for name in ("sagan", "pipeline", "jobs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    variables = {name: env[name] for name in ("SAGAN_BUCKET", "MLFLOW_TRACKING_URI")}
    runtime = f"--runtime-env-json={json.dumps({'env_vars': variables})}"
    submit = [str(BIN / "ray"), "job", "submit", "--working-dir", str(tmp_path), runtime, "--"]
    run = Driver(folder, env, command=submit, job=Path("jobs/quickstart.yaml"), name="carried", **{"train.kimg": 0.32})
    assert run.end() == 0, run.output
    assert files.read_json(f"{env['SAGAN_BUCKET']}/runs/carried/summary.json")["images"] == 320


@pytest.mark.slow
def test_what_diverged_ends_the_run_and_is_never_saved(place):
    folder, bucket, env = place
    run = Driver(folder, env, name="diverged", **{"optim.lr_d": 1e30, "optim.lr_g": 1e30})
    assert run.end() == 1, run.output
    assert "training diverged at" in run.output
    assert "Traceback" not in run.output
    assert checkpoints(bucket, "diverged") == []
    assert status(env, files.read_json(f"{bucket}/runs/diverged/run.json")) == "FAILED"
