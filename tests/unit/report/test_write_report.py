from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config.schema import DataSection, TrainJob
from pipeline.errors import CorruptError, UsageError
from pipeline.report import html_elements as html
from pipeline.report import write_report
from pipeline.report.runs_and_models import Reader
from pipeline.runs.json_records import (
    Lineage,
    RecordedInit,
    StudyRecord,
    SweepRecord,
    SweepSummary,
    SweepTrials,
    Trial,
)
from pipeline.runs.score_protocol import Score, ScoreProtocol
from pipeline.runs.stored_run import StoredRun, StoredStudy, StoredSweep
from pipeline.tuning.sweep_picture import draw_plane
from sagan.config import ModelConfig, OptimConfig
from sagan.train_state import TrainState
from sagan.trained_model import Model

MEGABYTE = 1_000_000
PROTOCOL = ScoreProtocol(
    extractor="pixels",
    extractor_digest="ab" * 32,
    resize="none",
    reference_digest="cd" * 32,
    split="train",
    samples=120,
    seed=0,
    weights="ema",
    batch_norm="standing 64",
)
Run = Callable[..., str]


class Written(Protocol):
    def __call__(self, urls: list[str], compared: int = 120, reader: Reader | None = None) -> str: ...


@pytest.fixture
def written(extractor: str, data: DataSection, tmp_path: Path) -> Written:
    """Writes the page as somebody who trusts the extractor file, and returns its text."""

    def write(urls: list[str], compared: int = 120, reader: Reader | None = None) -> str:
        out = tmp_path / "page" / "report.html"
        own = Reader({"cache": data.cache}, {"extractor": extractor, "trust_extractor": True})
        size = write_report.write_report(urls, out, compared, own if reader is None else reader)
        assert size == out.stat().st_size
        return out.read_text()

    return write


def explored(text: str) -> list[dict]:
    return [json.loads(found) for found in re.findall(r'<script type="application/json">(.*?)</script>', text)]


def test_the_page_of_a_run(written: Written, run: Run, tmp_path: Path) -> None:
    stored = StoredRun(run("first"))
    record = stored.record()
    assert record is not None
    init = RecordedInit(
        source="models:/<base>@champion",
        version="3",
        sha256="ab" * 32,
        taken=[f"layer {i}" for i in range(6)],
        skipped=["moments of Adam: new"],
    )
    stored.write_record(record.model_copy(update={"init": init}))
    text = written([stored.url])
    for said in ("models:/&lt;base&gt;/3", "layer 0; layer 1; layer 2; layer 3; and 2 more", "moments of Adam: new"):
        assert said in text
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    parts = ["Summary", "Scores", "Samples", "Attention", "Interpolation", "Nearest real images", "Classes"]
    assert titles == [*parts, "Protocols", "Method"]
    assert "fd_pixels" in text
    assert text.count('data-caption="') == 2  # a grid of each scored checkpoint
    (data,) = explored(text)
    assert [layer["title"] for layer in data["layers"]] == ["generator, 16×16", "discriminator, 16×16"]
    assert [image["name"] for image in data["images"]] == list("012345")
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert all("alt=" in tag for tag in re.findall(r"<img[^>]*>", text))


def test_scores_of_two_protocols_are_neither_compared_nor_drawn_together(
    written: Written, run: Run, tmp_path: Path
) -> None:
    first, second, third = run("first"), run("second", samples=100), run("third")
    apart = written([first, second])
    assert write_report.NOT_COMPARED in apart
    assert apart.count("<svg") == 2
    together = written([first, third])
    assert write_report.NOT_COMPARED not in together
    assert together.count("<svg") == 1
    assert together.count("<polyline") == 2


def test_a_sweep_brings_its_table_its_plane_and_its_best_trial(written: Written, run: Run, tmp_path: Path) -> None:
    best = run("sweep-b")
    sweep = StoredSweep(str(tmp_path / "runs" / "sweep"))
    assert sweep.trial("sweep-b").url == best
    sweep.write_record(SweepRecord(name="sweep", mlflow_run_id="0", method={}))
    with pytest.raises(UsageError, match="not ended"):
        written([sweep.url])
    trials = [
        Trial(name="sweep-a", point={"optim.lr_d": 1e-3}, score=None, kimg=1, outcome="diverged <early>"),
        Trial(name="sweep-b", point={"optim.lr_d": 4e-4}, score=12.5, kimg=2, outcome="finished"),
    ]
    sweep.write_trials(SweepTrials(trials=trials))
    sweep.write_summary(
        SweepSummary(
            name="sweep",
            trials=2,
            stopped_early=0,
            best=trials[1],
            mlflow_run_id="0",
            picture=sweep.picture_url,
            score=Score.of(PROTOCOL, "fd_pixels", False, {"fd_pixels": 12.5}),
        )
    )
    draw_plane(trials, [], "fd_pixels", Path(sweep.picture_url))
    text = written([sweep.url])
    assert text.index("sweep-b</th>") < text.index("sweep-a</th>")
    assert "diverged &lt;early&gt;" in text
    assert "2 trials. 0 of them were stopped early" in text
    assert "Attention" in text


def test_a_population_brings_its_lineage(written: Written, run: Run, tmp_path: Path) -> None:
    best = run("sweep-g1m0")
    sweep = StoredSweep(str(tmp_path / "runs" / "sweep"))
    assert sweep.trial("sweep-g1m0").url == best
    sweep.write_record(SweepRecord(name="sweep", mlflow_run_id="0", method={}))
    lineage = Lineage(run="sweep-g0m1", checkpoint="000000002000-0", generation=1)
    rates = {"sweep-g0m1": 4e-4, "sweep-g0m0": 2e-4}
    trials = [
        Trial(name=name, point={"optim.lr_d": lr}, score=14.0, kimg=1, outcome="stopped early")
        for name, lr in rates.items()
    ]
    clone = Trial(name="sweep-g1m0", point={"optim.lr_d": 3e-4}, score=12.5, kimg=2, outcome="finished", parent=lineage)
    sweep.write_trials(SweepTrials(trials=[*trials, clone]))
    summary = SweepSummary(
        name="sweep",
        trials=3,
        stopped_early=2,
        best=clone,
        mlflow_run_id="0",
        picture=sweep.picture_url,
        score=Score.of(PROTOCOL, "fd_pixels", False, {"fd_pixels": 12.5}),
    )
    sweep.write_summary(summary)
    draw_plane([*trials, clone], [], "fd_pixels", Path(sweep.picture_url))
    text = written([sweep.url])
    assert "clone of</th>" in text
    assert re.search(r"sweep-g1m0</th>.*?<td>sweep-g0m1</td><td>1</td></tr>", text, re.DOTALL)


def test_a_study_brings_its_tables_its_picture_and_a_run_of_its_reference_row(
    written: Written, run: Run, study: Callable[[StoredRun], StoredStudy], tmp_path: Path
) -> None:
    empty = StoredStudy(str(tmp_path / "runs" / "studies" / "empty"))
    empty.write_record(StudyRecord(name="empty", mlflow_run_id="0"))
    with pytest.raises(UsageError, match="no run of its reference row that has ended"):
        written([empty.url])
    text = written([study(StoredRun(run("s-none-0"))).url])
    assert "<h2>Study s</h2>" in text
    assert "-1.5 to -1.5" in text
    assert "2, in" in text
    assert "a &lt;paper&gt;; theirs" in text
    assert "Below is s-none-0" in text
    assert "A sweep chose for the row feat16: optim.lr_d 0.0004." in text
    assert "Attention" in text


def test_a_model_alone_shows_the_generator_and_says_so(model: Model, tmp_path: Path) -> None:
    model.save(tmp_path / "pulled")
    out = tmp_path / "alone.html"
    said = CliRunner().invoke(app, ["report", str(tmp_path / "pulled"), "--out", str(out)], catch_exceptions=False)
    text = out.read_text()
    assert f"{out}: {len(text.encode()) / MEGABYTE:.1f} MB" in said.output
    assert "This model has no discriminator" in text
    (data,) = explored(text)
    assert [layer["title"] for layer in data["layers"]] == ["generator, 16×16"]


def test_a_class_name_that_no_file_can_hold_is_shown_escaped(model: Model, tmp_path: Path) -> None:
    """JSON can write half of a letter, which UTF-8 cannot."""
    model.save(tmp_path / "pulled")
    facts = tmp_path / "pulled" / "config.json"
    names = ["half \ud800 <a>", *map(str, range(1, 10))]
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"class_names": names}))
    out = tmp_path / "page.html"
    CliRunner().invoke(app, ["report", str(tmp_path / "pulled"), "--out", str(out)], catch_exceptions=False)
    text = out.read_text()
    assert r"half \ud800 &lt;a&gt;" in text
    (data,) = explored(text)
    assert data["images"][0]["name"] == names[0]


def test_what_cannot_be_compared_is_left_out_and_said(written: Written, run: Run, tmp_path: Path) -> None:
    stored = StoredRun(run("first"))
    record = stored.record()
    assert record is not None
    gone = record.data.model_copy(update={"train": str(tmp_path / "gone")})
    stored.write_record(record.model_copy(update={"data": gone}))
    text = written([stored.url])
    assert "comparison with real images is left out" in text
    assert "Classes" not in re.findall(r"<h2>(.*?)</h2>", text)
    stored.write_record(record.model_copy(update={"method": record.method | {"data.collection": "another"}}))
    assert "another collection" in written([stored.url])


def test_a_run_whose_scores_several_workers_took_needs_none_of_them(
    run: Run, written: Written, job: TrainJob, extractor: str
) -> None:
    section = job.evaluate.model_copy(update={"extractor": extractor, "trust_extractor": True, "workers": 2})
    reader = Reader.of(job.model_copy(update={"evaluate": section}))
    assert "comparison with real images is left out" not in written([run("first")], reader=reader)


def test_the_record_of_a_run_decides_nothing_on_the_readers_machine(
    run: Run, extractor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    url = run("first")
    record = json.loads(Path(url, "run.json").read_text())
    assert record["evaluate"]["extractor"] == "pixels.ts"
    assert not {"cache", "cache_gb"} & record["data"].keys()
    out = tmp_path / "page.html"
    report = ["report", url, "--out", str(out), "--samples", "60"]
    CliRunner().invoke(app, report, catch_exceptions=False)
    text = out.read_text()
    assert "left out: the run was scored with the extractor file pixels.ts, which is a program" in text
    assert "--extractor FILE --extractor-sha256" in text
    digest = hashlib.sha256(Path(extractor).read_bytes()).hexdigest()
    own = ["--extractor", extractor, "--cache", str(tmp_path / "cache")]
    CliRunner().invoke(app, [*report, *own], catch_exceptions=False)
    assert f"is a program, which runs with your rights. Its SHA-256 is {digest}" in out.read_text()
    CliRunner().invoke(app, [*report, *own, "--extractor-sha256", digest], catch_exceptions=False)
    assert "left out" not in out.read_text()
    # Keys that a record of an older version had are refused, and not followed.
    victim = tmp_path / "documents"
    victim.mkdir()
    (victim / "letter.txt").write_text("dear")
    for planted in ({"data": record["data"] | {"cache": str(victim), "cache_gb": 1e-9}}, {"format": 2}):
        Path(url, "run.json").write_text(json.dumps(record | planted))
        with pytest.raises(CorruptError, match=r"run\.json"):
            CliRunner().invoke(app, report, catch_exceptions=False)
    assert [path.name for path in victim.iterdir()] == ["letter.txt"]


def test_what_is_no_run_is_told_what_is_one(written: Written, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a run nor a sweep nor a model") as caught:
        written([str(tmp_path)])
    assert "<checkpoint.root>/<name>" in caught.value.remedy
    with pytest.raises(UsageError, match="3 runs"):
        CliRunner().invoke(app, ["report", "a", "b", "c"], catch_exceptions=False)


def test_few_images_of_a_class_are_not_ranked(written: Written, run: Run, tmp_path: Path) -> None:
    url = run("first")
    assert "With 48 features, it is noise for fewer than 96 generated or" in written([url], compared=400)
    assert "no class has 10 of both" in written([url], compared=20)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).numpy())


def test_a_picture_is_exact_where_it_may_be_and_fits_where_it_must() -> None:
    def sizes(image: Image.Image, budget: int) -> tuple[int, Image.Image]:
        uri = html.data_uri(image, budget)
        return len(uri), Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))

    small, large = noise(32, 32), noise(960, 1200)
    assert sizes(small, 10_000)[1].convert("RGB").tobytes() == small.tobytes()
    for image, budget in ((small, 1_000), (noise(256, 256), 3_000), (large, 150_000), (large, 2_000)):
        assert sizes(image, budget)[0] <= budget
    assert sizes(large, 800_000)[1].size == large.size


def test_the_largest_page_of_two_stays_below_its_bound(written: Written, run: Run, tmp_path: Path) -> None:
    """Runs whose grids are noise, and 128 px models of saturated noise with two attention layers."""
    runs = [run("first"), run("second")]
    for url in runs:
        for path in Path(url, "grids").iterdir():
            noise(960, 960).save(path)
    of_runs = len(written(runs).encode())
    config = ModelConfig(resolution=128, num_classes=10, channels_g=4, channels_d=8, attention=(32, 64))
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        model = Model.from_state(TrainState(config, OptimConfig(), seed), standing_images=32)
        model.generator.conv.weight.mul_(1e4)
        images = model.sample(n=2).float()
        assert images.std() > 60  # no compression makes little of it
        model.save(folder)
    of_models = len(written([str(folder) for folder in folders]).encode())
    assert max(of_runs, of_models) < write_report.PAGE_BYTES


@pytest.mark.parametrize("without", [{"attention": ()}, {"attention_form": "residual_1x1"}])
def test_what_attention_takes_of_the_file_is_bounded(written: Written, tmp_path: Path, without: dict[str, Any]) -> None:
    config = ModelConfig(resolution=128, num_classes=0, channels_g=8, channels_d=8, attention_form="icml")
    for name, networks in (("a", config), ("b", replace(config, **without))):
        Model.from_state(TrainState(networks, OptimConfig(), 0), standing_images=32).save(tmp_path / name)
    text = written([str(tmp_path / "a"), str(tmp_path / "b")])
    assert len(text) < write_report.PAGE_BYTES
    (data,) = explored(text)
    assert [(layer["queries"], layer["keys"]) for layer in data["layers"]] == [(32, 16)]
    assert len(data["images"]) == 4  # of 256 KiB, in the half that one of two models gets
    assert "no self-attention" in text


def test_nothing_of_a_name_becomes_part_of_the_page() -> None:
    hostile = '</script><b>"&'
    text = html.whole(hostile, [html.Section(hostile, html.joined([html.data({"name": hostile}), hostile]))])
    assert "<b>" not in text
    assert json.loads(re.findall(r"json\">(.*?)</script>", text)[0]) == {"name": hostile}


@pytest.mark.parametrize("contents", [b"", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG\r\n\x1a\n" + b"x" * 99])
def test_a_stored_picture_that_is_none_is_named_and_starts_no_program(
    written: Written, run: Run, contents: bytes
) -> None:
    url = run("first")
    (grid, *_) = sorted(Path(url).glob("grids/*"))
    grid.write_bytes(contents)
    with pytest.raises(CorruptError, match=rf"{grid.name} is not a picture"):
        written([url])


def test_a_record_without_the_digest_of_its_collection_is_compared_with_no_images(written: Written, run: Run) -> None:
    stored = StoredRun(run("first"))
    record = stored.record()
    assert record is not None
    stored.write_record(record.model_copy(update={"method": {}}))
    assert "another collection" in written([stored.url])


def test_the_plane_of_a_sweep_shows_values_that_are_no_numbers(tmp_path: Path) -> None:
    points: list[dict[str, Any]] = [
        {"model.attention": [], "optim.loss": "hinge"},
        {"model.attention": [16], "optim.loss": "b$c$e"},
        {"model.attention": None, "optim.loss": "hinge"},
    ]
    trials = [
        Trial(name=f"s-{i}", point=point, score=float(i), kimg=1, outcome="finished") for i, point in enumerate(points)
    ]
    marked: list[dict[str, Any]] = [{"model.attention": [8], "optim.loss": "hinge"}, {"optim.loss": "bce"}]
    draw_plane(trials, marked, "fd_pixels", tmp_path / "labels.png")
    numbers = [trial.model_copy(update={"point": {"optim.beta1": 0.5 * i}}) for i, trial in enumerate(trials)]
    draw_plane(numbers, [], "fd_pixels", tmp_path / "zero.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("labels.png", "zero.png"))
