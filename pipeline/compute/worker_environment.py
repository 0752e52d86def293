"""Environment variables that a job sets for its workers: which of them Ray may show, and which are secret."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pipeline.errors import shown_url

_SECRET = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|KEY|AUTH")


def split_environment(env: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the variables that Ray may show, and the others, which workers set themselves.

    Ray sets the former before a worker's process starts, and shows them in its state and its dashboard. The latter have
    the name of a secret, or hold a URL with a password.
    """
    secrets = {name: value for name, value in env.items() if _SECRET.search(name.upper()) or shown_url(value) != value}
    return {name: value for name, value in env.items() if name not in secrets}, secrets
