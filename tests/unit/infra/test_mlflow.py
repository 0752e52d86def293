"""`infra/mlflow/serve.sh` refuses settings that are missing or that admit everybody."""

from __future__ import annotations

import os
import subprocess

import pytest

from infra.local.server_process import CHECKOUT
from tests.document_blocks import ROOT

SETTINGS = {
    "PGHOST": "db.example.com",
    "PGUSER": "mlflow",
    "PGPASSWORD": "a secret",
    "PGDATABASE": "mlflow",
    "MLFLOW_ARTIFACTS_DESTINATION": "s3://mlflow",
    "MLFLOW_SERVER_ALLOWED_HOSTS": "mlflow.example.com",
    "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": "https://mlflow.example.com",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "another secret",
}


def serve(settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], **settings}
    return subprocess.run(
        [str(CHECKOUT / "infra/mlflow/serve.sh")], env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("empty", [True, False])
def test_a_missing_setting_is_named(name: str, empty: bool) -> None:
    refused = serve({**SETTINGS, name: ""} if empty else {k: v for k, v in SETTINGS.items() if k != name})
    assert (refused.returncode, refused.stderr.split(" is not set")[0]) == (2, f"error: {name}")
    assert f"{name}=" in (ROOT / "infra/mlflow/README.md").read_text()


@pytest.mark.parametrize("name", ["MLFLOW_SERVER_ALLOWED_HOSTS", "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"])
def test_a_server_that_admits_every_site_is_refused(name: str) -> None:
    for value in ("*", f"{SETTINGS[name]},*"):
        refused = serve({**SETTINGS, name: value})
        assert refused.returncode == 2
        assert name in refused.stderr
