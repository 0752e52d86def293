"""`sagan pack` as people call it: what it prints to run next works, and what it cannot do it says."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from pipeline import cli
from pipeline.collection.manifest import Collection
from pipeline.config.schema import PackSection
from pipeline.errors import SaganError, UsageError, shown_url
from pipeline.packing.pack import pack
from pipeline.packing.recognise import open_source
from tests.unit.packing.coloured_images import by_colour, picture, tar, write
from tests.unit.packing.read_collection import bytes_of

CHECKOUT = Path(__file__).parents[2]
pytestmark = pytest.mark.system


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in a shell that knows `sagan`, in the current folder."""
    function = f'sagan() {{ {shlex.quote(sys.executable)} -m pipeline "$@"; }}\n'
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "SAGAN_BUCKET": "runs"}
    return subprocess.run(
        ["bash", "-c", function + command], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("folders", "destination", "resolution"),
    [
        (["Training", "Testing"], "set", 32),
        (["training", "validation"], "my set", 32),
        (["val", "test"], "it's $HOME", 64),
        (["train", "Hold-Out"], 'a&b;c"d', 128),
        (None, "é*?[x]{y}!", 256),
    ],
)
def test_the_command_that_is_printed_works_in_a_shell(
    folders: list[str] | None,
    destination: str,
    resolution: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = [f"{folder}/{name}" for folder in folders or [] for name in ("cat", "giraffe")] or ["."]
    images = {f"{path}/{n}.png": picture(n, i) for i, path in enumerate(paths) for n in range(3)}
    write(tmp_path / "source", images)
    monkeypatch.chdir(CHECKOUT if destination == "set" else tmp_path)
    pack(f"{tmp_path}/{destination}", PackSection(source=f"{tmp_path}/source", resolution=resolution))
    (command,) = re.findall(r"^next: (.+)$", capsys.readouterr().out, re.MULTILINE)
    assert command.startswith("sagan run jobs/") == (destination == "set")
    result = shell(f"{command} --dry-run --json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert (facts["resolution"], facts["num_classes"]) == (resolution, 2 if folders else 0)
    assert facts["epochs"] > 0, "the collection and its split were found"


class TestNames:
    @pytest.fixture
    def sagan(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> partial:
        """Run a command in an empty folder; returns the result, whose exception is that of the command."""
        monkeypatch.chdir(tmp_path)
        return partial(CliRunner().invoke, cli.app)

    def test_a_folder_called_digits_is_not_taken_silently(self, sagan: partial, tmp_path: Path) -> None:
        write(
            tmp_path, {f"digits/{name}/{n}.png": picture(n, len(name)) for name in ("zero", "three") for n in range(3)}
        )
        for arguments in (["digits"], ["train=digits"]):
            error = sagan(["pack", *arguments, "out", "--resolution", "32"]).exception
            assert isinstance(error, UsageError)
            assert "./digits" in error.remedy
        assert sagan(["pack", "./digits", "out", "--resolution", "32"]).exit_code == 0
        assert Collection.open(f"{tmp_path}/out").class_names == ["three", "zero"]

    def test_a_destination_called_digits_is_no_source(self, sagan: partial, tmp_path: Path) -> None:
        """Its folder is there after an interrupted packing."""
        (tmp_path / "digits").mkdir()
        assert sagan(["pack", "digits", "digits", "--resolution", "32"]).exit_code == 0
        assert Collection.open(f"{tmp_path}/digits").num_classes == 10

    @pytest.mark.parametrize("name", ["year=2024/month=01", "./dt=2024-01-01", "a b=c/d"])
    def test_an_equals_sign_in_a_path_names_no_split(self, name: str, sagan: partial, tmp_path: Path) -> None:
        write(tmp_path, {f"{name}/cat/1.png": picture(1), f"{name}/dog/2.png": picture(2)})
        place = name if name.startswith("./") else f"{tmp_path}/{name}"
        assert sagan(["pack", place, "out", "--resolution", "32"]).exit_code == 0
        assert Collection.open(f"{tmp_path}/out").class_names == ["cat", "dog"]

    @pytest.mark.parametrize("source", ["s3://bucket/dt=2024-01-01", "memory://bucket/a=b", "http://127.0.0.1:1/x?y=z"])
    def test_an_equals_sign_in_a_url_names_no_split(self, source: str, sagan: partial) -> None:
        error = sagan(["pack", source, "out", "--resolution", "32"]).exception
        assert isinstance(error, SaganError)
        assert shown_url(source) in error.message  # a query may be a secret

    def test_a_split_is_given_once(self, sagan: partial) -> None:
        error = sagan(["pack", "train=a", "train=b", "out"]).exception
        assert isinstance(error, UsageError)

    def test_a_name_that_is_no_utf_8_is_escaped_everywhere(self, sagan: partial, tmp_path: Path) -> None:
        names = {os.fsdecode(b"caf\xe9"): "caf\\udce9", "tab\tbar": "tab\\tbar", "thé": "thé"}
        write(tmp_path, {f"set/{name}/{n}.png": picture(n, len(name)) for name in names for n in range(3)})
        result = sagan(["pack", "set", "out", "--resolution", "32"])
        assert result.exit_code == 0, result.output
        collection = Collection.open(f"{tmp_path}/out")
        assert collection.class_names == sorted(names.values())
        assert all(name.isprintable() for name in collection.class_names)
        assert (tmp_path / "out" / "keys.txt").read_text(encoding="utf-8").count("caf\\udce9/") == 3
        assert "0 = caf\\udce9" in result.output

    def test_two_classes_with_one_printable_name_are_refused(self, sagan: partial, tmp_path: Path) -> None:
        write(tmp_path, {f"set/{name}/1.png": picture(1) for name in ("a\tb", "a\\tb")})
        error = sagan(["pack", "set", "out", "--resolution", "32"]).exception
        assert isinstance(error, UsageError)
        assert "two classes have the same name" in error.message


class TestFullTemporaryFolder:
    """A file system of 200 kB as TMPDIR, mounted for the process of the command only."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> partial:
        (tmp_path / "small").mkdir()
        if subprocess.run(["unshare", "--mount", "--map-root-user", "true"], check=False).returncode:
            pytest.skip("this machine allows no mounts")

        def run(*arguments: object) -> subprocess.CompletedProcess[str]:
            mount = f"mount -t tmpfs -o size=200k tmpfs {tmp_path}/small"
            command = shlex.join([sys.executable, "-m", "pipeline", *map(str, arguments)])
            return subprocess.run(
                ["unshare", "--mount", "--map-root-user", "sh", "-c", f"{mount} && TMPDIR={tmp_path}/small {command}"],
                env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=False,
            )

        return partial(run)

    @pytest.mark.parametrize("form", ["folder", "parquet", "verify"])
    def test_the_folder_and_tmpdir_are_named(self, form: str, run: partial, tmp_path: Path) -> None:
        noise = []
        for _ in range(12):
            out = io.BytesIO()
            Image.effect_noise((128, 128), 90).convert("RGB").save(out, "PNG")
            noise.append(out.getvalue())
        arguments: list[object] = ["pack", "set", "out", "--resolution", 128, "--encoding", "png"]
        if form == "parquet":
            (tmp_path / "set").mkdir()
            pq.write_table(pa.table({"image": noise * 3}), tmp_path / "set" / "x.parquet")
        else:
            write(tmp_path / "set", {f"{n}.png": data for n, data in enumerate(noise)})
        if form == "verify":
            pack(f"{tmp_path}/out", PackSection(source=f"{tmp_path}/set", resolution=128, encoding="png"))
            arguments = ["verify", "out"]
        result = run(*arguments)
        assert result.returncode == 3, result.stderr
        assert "Traceback" not in result.stderr
        assert f"{tmp_path}/small" in result.stderr
        assert "no space left" in result.stderr
        assert "TMPDIR" in result.stderr


class _WithoutRanges(SimpleHTTPRequestHandler):
    """Python's own server knows no ranges."""

    def log_message(self, *arguments: object) -> None:
        pass


class _FalseRanges(_WithoutRanges):
    """Answers a request for one byte as a server with ranges does, and any other with the whole file."""

    def do_GET(self) -> None:
        if self.headers.get("Range") == "bytes=0-0":
            self.send_response(206)
            self.send_header("Content-Length", "1")
            self.end_headers()
            self.wfile.write(b"x")
            return
        super().do_GET()


class TestHttp:
    @pytest.fixture(params=[_WithoutRanges])
    def server(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
        handler: type[SimpleHTTPRequestHandler] = request.param
        with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=tmp_path)) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()
            thread.join()

    @pytest.mark.parametrize("name", ["set.tar", "set.parquet", "set.csv", "cifar.tar.gz"])
    def test_a_server_without_ranges_is_read(self, name: str, server: str, tmp_path: Path) -> None:
        images = {f"{c}/{n}.png": picture(n, ord(c)) for c in "ab" for n in range(20)}
        write(tmp_path, {"set.tar": tar(images), **images})
        write(tmp_path, {"set.csv": "path,label\n" + "".join(f"{name},{name[0]}\n" for name in images)})
        pq.write_table(
            pa.table({"image": list(images.values()), "label": [name[0] for name in images]}), tmp_path / "set.parquet"
        )
        with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as file:
            file.add(tmp_path / "a")
        if name == "cifar.tar.gz":
            with pytest.raises(UsageError, match="is compressed"):
                open_source(f"{server}/{name}")
            return
        expected = by_colour(open_source(f"{tmp_path}/{name}"))
        assert by_colour(open_source(f"{server}/{name}")) == expected
        pack(f"{tmp_path}/1", PackSection(source=f"{tmp_path}/{name}", resolution=32))
        pack(f"{tmp_path}/2", PackSection(source=f"{server}/{name}", resolution=32))
        assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "2")

    @pytest.mark.parametrize("server", [_FalseRanges], indirect=True)
    def test_a_server_that_sends_other_bytes_is_a_fault(self, server: str, tmp_path: Path) -> None:
        write(tmp_path, {"set.tar": tar({"a/1.png": picture(1), "b/2.png": picture(2)})})
        with pytest.raises(SaganError) as caught:
            pack(f"{tmp_path}/out", PackSection(source=f"{server}/set.tar", resolution=32))
        assert caught.value.exit_code == 3
        assert f"{server}/set.tar" in caught.value.message

    def test_a_missing_file_is_named(self, server: str) -> None:
        with pytest.raises(UsageError, match=r"none\.tar does not exist"):
            open_source(f"{server}/none.tar")
