"""A short run of the fuzzer of foreign inputs; `python -m tests.faults.hostile` is the long one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What no reader may do with a changed input, by the column in which it is counted. NAME is a file of somebody else.
DEEDS = {
    "exceptions": ["raise KeyError('x')"],
    "signals": ["os.abort()"],
    "outside": ["open(NAME, 'w')", "os.remove(NAME)", "os.system('true')"],
    "> 1 GB": ["bytearray(3 * 2**29)"],
    "> 30 s": ["time.sleep(600)"],
    "wrong": ["print('wrong')", "print(chr(27) + '[2J')", "sys.exit('not an error of sagan')"],
}
PLANTED = """
import os, sys, time
from tests.faults.hostile import __main__, all_kinds, read_inputs
from tests.faults.hostile.kind import Kind

def build(root):
    (root / "planted").mkdir()

def change(folder, random, names):
    (folder / "name").write_text(names[0])

def kind(deed):
    def read(source, out):
        if (source / "name").exists():
            exec(deed, globals() | {"NAME": (source / "name").read_text()})
    return Kind("planted", 1, "planted", change, read, lambda out, printed: "wrong" not in printed)

all_kinds.build, read_inputs._IMPORTED, read_inputs.SECONDS = build, (), 10.0
read_inputs._PARALLEL = 1  # so that a missing file is counted for the input that is being read
read_inputs.KINDS.clear()
read_inputs.KINDS.update({deed: kind(deed) for deed in sys.argv.pop().split("; ")})
sys.exit(__main__.main())
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280)


def test_changed_inputs_are_refused_or_read_right(tmp_path: Path) -> None:
    failures = tmp_path / "failures"
    done = run("-m", "tests.faults.hostile", "--seed", "19", "--inputs", "60", "--failures", str(failures))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not failures.exists()


def test_every_kind_of_failure_is_counted_and_its_input_is_kept(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    columns = [(column, deed) for column, deeds in DEEDS.items() for deed in deeds]
    every = "; ".join(deed for _, deed in columns)
    done = run("-c", PLANTED, "--inputs", str(len(columns)), "--failures", str(kept), every)
    assert done.returncode == 1, done.stdout + done.stderr
    assert str(kept) in done.stdout
    found = {}
    for folder in kept.iterdir():
        what, how, *_ = (folder / "how.txt").read_text().splitlines()
        assert (folder / "in" / "name").exists()
        found[how.partition("--only '")[2].rpartition(":0'")[0]] = what
    assert found == {deed: column for column, deed in columns}
