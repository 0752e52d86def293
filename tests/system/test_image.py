"""The image is built without a registry by the commands of infra/README.md, and trains as Kubernetes would run it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.document_blocks import ROOT, block
from tests.progress_timeout import progress_seen
from tests.system.command_process import TINY

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("ray")]

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# What a container engine does: a root file system that is read-only, scratch for the user, /proc, /dev and /sys.
RUN = """
root=$1 scratch=$2; shift 2
mount --make-rprivate /
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
for path in tmp home/sagan opt/sagan/runs; do
    mkdir -p "$scratch/$path"
    chown 1000:1000 "$scratch/$path"
    mount --bind "$scratch/$path" "$root/$path"
done
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount --bind /etc/hosts "$root/etc/hosts"
exec chroot --userspec=1000:1000 "$root" env -C /opt/sagan tini -- "$@"
"""


def run(command: list[str | Path], env: Mapping[str, str], folder: Path = ROOT) -> str:
    """Run a command and return what it printed. Its lines are progress."""
    with subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            progress_seen()
            printed.append(line)
    assert process.returncode == 0, "".join(printed[-60:])
    return "".join(printed)


def pip_settings(folder: Path) -> list[str]:
    """Write pip's settings of this environment to a file. Return the volumes with which a build uses them, too."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    found = [re.findall(rf"^{where}\.([a-z-]+)='(.*)'$", listed.stdout, re.MULTILINE) for where in ("global", ":env:")]
    settings: dict[str, str] = {name: value for part in found for name, value in part}
    lines = ["[global]", *(f"{name} = {value}" for name, value in settings.items())]
    (folder / "pip.conf").write_text("\n".join(lines) + "\n")
    paths = {Path(urlsplit(word).path) for value in settings.values() for word in value.split() if "/" in word}
    local = {path.parent if path.name == "simple" else path for path in paths if path.exists()}
    return [f"{folder}/pip.conf:/etc/pip.conf:ro", *(f"{path}:{path}:ro" for path in sorted(local))]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The root file system of the image."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("buildah", "mmdebstrap"))):
        pytest.skip("needs root, and Debian's packages buildah and mmdebstrap")
    folder = tmp_path_factory.mktemp("image")
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "vfs"\ngraphroot = "{folder}/storage"\nrunroot = "{folder}/run"\n'
    )
    (folder / "containers.conf").write_text(f"[containers]\nvolumes = {json.dumps(pip_settings(folder))}\n")
    env = {
        **os.environ,
        "BUILDAH_ISOLATION": "chroot",
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        "CONTAINERS_CONF": str(folder / "containers.conf"),
        "TMPDIR": str(folder),
    }
    code = block("infra/README.md", "image").replace("$(git rev-parse HEAD)", COMMIT)
    assert COMMIT in code
    try:
        run(["bash", "-euxo", "pipefail", "-c", code], env)
        container = run(["buildah", "from", "sagan"], env).split()[-1]
        yield Path(run(["buildah", "mount", container], env).split()[-1])
    finally:
        subprocess.run(["buildah", "rm", "--all"], env=env, check=False)
        subprocess.run(["buildah", "rmi", "--all", "--force"], env=env, check=False)


@pytest.fixture
def inside(image: Path, tmp_path: Path):
    """Runs a command in the image as its user. `tmp_path / "tmp"` is the image's /tmp."""

    def inside(*command: str) -> str:
        env = {
            "HOME": "/home/sagan",
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin",  # chroot is in the last one
            "PYTHONUNBUFFERED": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "SAGAN_BUCKET": "/tmp/bucket",
            "MLFLOW_TRACKING_URI": "sqlite:////tmp/mlflow.db",
        }
        unshare = ["unshare", "--mount", "--pid", "--fork", "bash", "-euo", "pipefail", "-c", RUN, "run"]
        return run([*unshare, image, tmp_path, *command], env)

    return inside


def test_the_image_says_what_it_is(image, inside):
    assert (image / "opt/sagan/COMMIT").read_text() == f"{COMMIT}\n"
    debian = dict(line.split("\t") for line in (image / "opt/sagan/sbom/debian.tsv").read_text().splitlines())
    assert {"gcc", "tini", "rsync", "openssh-client"} <= set(debian)
    inspected = json.loads((image / "opt/sagan/sbom/python.json").read_text())["installed"]
    python = {each["metadata"]["name"].lower(): each["metadata"]["version"] for each in inspected}
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {name: python[name] for name in ("ray", "mlflow")} == {name: pins[name] for name in ("ray", "mlflow")}
    assert python["torch"].split("+")[0] == pins["torch"]
    assert not any((image / "opt/sagan" / name).exists() for name in ("tests", ".git", ".venv"))
    size = sum(path.lstat().st_size for path in image.rglob("*") if path.is_file() and not path.is_symlink())
    print(f"{len(debian)} packages of Debian, {len(python)} of Python, {size / 1e9:.2f} GB")


def test_the_user_is_unprivileged_and_the_root_is_read_only(inside):
    assert inside("id", "-u").split() == ["1000"]
    assert inside("sh", "-c", "for each in /opt/sagan /usr /etc; do ! touch $each/x; done").count("Read-only") == 3
    inside("sh", "-c", "touch /tmp/x ~/x runs/x")


def test_triton_can_compile(inside):
    """Triton compiles C that includes Python's header."""
    include = "$(python -c 'import sysconfig; print(sysconfig.get_path(\"include\"))')"
    program = "printf '#include <Python.h>\\nint main(void) { return 0; }' > /tmp/x.c"
    inside("sh", "-ec", f'{program}; gcc -I "{include}" -c /tmp/x.c -o /tmp/x.o')


def test_the_quickstart_trains_to_a_champion(inside, tmp_path):
    overrides = [f"{key}={value}" for key, value in TINY.items()]
    inside("sagan", "run", "jobs/quickstart.yaml", *overrides)
    inside("sagan", "pull", "models:/quickstart@champion", "/tmp/champion")
    inside("sagan", "sample", "/tmp/champion", "--out", "/tmp/samples.png", "--n", "10")
    assert (tmp_path / "tmp/samples.png").stat().st_size > 1000
    records = list((tmp_path / "tmp/bucket/runs/quickstart/checkpoints").glob("*/checkpoint.json"))
    assert {json.loads(record.read_text())["git_commit"] for record in records} == {COMMIT}
