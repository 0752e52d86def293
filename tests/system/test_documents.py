"""What the documents tell people to type works as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.document_blocks import ROOT, blocks

DOCUMENTS = ["README.md", "sagan/README.md", "pipeline/README.md", "jobs/README.md"]
DOCUMENTS += ["infra/README.md", "infra/machines/README.md", "infra/mlflow/README.md"]
SELF_CONTAINED = [
    pytest.param(language, code, id=f"{document}-{i}")
    for document in DOCUMENTS
    for i, (name, language, code) in enumerate(blocks(document))
    if not name  # named blocks need something made first; the tests that make it run them
]


@pytest.mark.parametrize(("language", "code"), SELF_CONTAINED)
def test_marked_blocks_run(language, code, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = {"python": [sys.executable, "-c", code], "sh": ["bash", "-euo", "pipefail", "-c", code]}[language]
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_documents_link_to_exist(document):
    folder = (ROOT / document).parent
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / document).read_text())
    assert [link for link in links if not (folder / link).exists()] == []
