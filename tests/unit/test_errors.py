"""No secret and no control character reaches a message, and numbers agree with their nouns."""

from __future__ import annotations

import pickle

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import EnvironmentFault, SaganError, counted, shown_url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:p%40ss@host:5000/a/b?sig=1&x=2#f", "https://host:5000/a/b"),
        ("postgresql://u:p@ss@db/mlflow", "postgresql://db/mlflow"),
        ("https://token@host", "https://host"),
        ("s3://bucket/a?b#c.png", "s3://bucket/a?b#c.png"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("models:/cifar10@champion", "models:/cifar10@champion"),
        ("/plain/path?x", "/plain/path?x"),
        ("MLflow at http://u:p@h fails: ('http://u:p@h/api?t=1')", "MLflow at http://h fails: ('http://h/api')"),
    ],
)
def test_a_url_is_shown_without_secrets(url: str, shown: str) -> None:
    assert shown_url(url) == shown
    assert shown_url(shown) == shown
    assert SaganError(url, url).message == SaganError(url, url).remedy == shown


def test_control_characters_are_escaped_and_an_error_survives_pickle() -> None:
    error = SaganError("class \x1b[2Jant\r\u202eb\n  next", "say \x07")
    assert str(error) == "class \\x1b[2Jant\\r\\u202eb\n  next\n  → say \\x07"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_the_tracking_uri_is_shown_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    for uri in ("http://user:hunter2@127.0.0.1:9", "https://user:hunter2@127.0.0.1:9/?token=hunter2"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        said = CliRunner().invoke(app, ["doctor", "--json"]).output
        assert "127.0.0.1:9" in said
        assert "hunter2" not in said
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@127.0.0.1:9")
    with pytest.raises(EnvironmentFault) as refused:
        CliRunner().invoke(app, ["pull", "models:/a@champion", "nowhere"], catch_exceptions=False)
    assert "127.0.0.1:9" in refused.value.message
    assert "hunter2" not in str(refused.value)


def test_a_number_has_its_noun_in_the_plural_where_it_is_not_one() -> None:
    assert [counted(n, "image") for n in (0, 1, 1200)] == ["0 images", "1 image", "1,200 images"]
    assert [counted(n, "CPU") for n in (0.5, 1.0, 16.0)] == ["0.5 CPUs", "1 CPU", "16 CPUs"]
