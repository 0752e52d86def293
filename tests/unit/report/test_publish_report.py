from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageSequence

from pipeline.config.schema import TrainJob
from pipeline.report.publish_report import publish_report, publish_study_report
from pipeline.runs.stored_run import StoredRun, StoredStudy
from pipeline.tracking.mlflow_run import client


def test_a_run_that_ends_leaves_its_page_and_its_grids_in_motion(
    run: Callable[..., str], job: TrainJob, run_id: str, extractor: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = StoredRun(run("first"))
    section = job.evaluate.model_copy(update={"extractor": extractor, "trust_extractor": True})
    job = job.model_copy(update={"name": "first", "evaluate": section})
    publish_report(job, run_id)
    assert stored.report_url in capsys.readouterr().out
    page, grids = Path(stored.report_url), Path(stored.animation_url)
    assert "Nearest real images" in page.read_text()
    assert "left out" not in page.read_text()
    with Image.open(grids) as moving:
        assert (moving.format, len(ImageSequence.all_frames(moving))) == ("GIF", 2)
    logged = client(job.track.uri or "").list_artifacts(run_id)
    assert {a.path: a.file_size for a in logged if not a.is_dir} == {
        path.name: path.stat().st_size for path in (page, grids)
    }


def test_a_study_that_ends_leaves_its_page(
    run: Callable[..., str],
    study: Callable[[StoredRun], StoredStudy],
    job: TrainJob,
    run_id: str,
    extractor: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    section = job.evaluate.model_copy(update={"extractor": extractor, "trust_extractor": True})
    job = job.model_copy(update={"name": "s-none-0", "evaluate": section})
    stored = study(StoredRun(run("s-none-0")))
    publish_study_report(job, stored, run_id)
    assert stored.report_url in capsys.readouterr().out
    page = Path(stored.report_url)
    assert "<h2>Study s</h2>" in page.read_text()
    assert "left out" not in page.read_text()
    logged = client(job.track.uri or "").list_artifacts(run_id)
    assert page.stat().st_size in [a.file_size for a in logged if a.path == page.name]


def test_a_page_that_cannot_be_written_costs_the_run_nothing(
    job: TrainJob, run_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    publish_report(job, run_id)  # there is no run
    assert f"sagan report {StoredRun.of(job).url}" in caplog.text
