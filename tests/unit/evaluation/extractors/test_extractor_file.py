from __future__ import annotations

import contextlib
import hashlib
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config.schema import EvaluateSection
from pipeline.errors import ConfigError, CorruptError, EnvironmentFault, UsageError
from pipeline.evaluation.extractors.extractor_file import extractor_from_file
from pipeline.evaluation.extractors.published_weights import load_published
from pipeline.evaluation.metrics import FRECHET_DISTANCE


class Tiny(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = images.float().mean((2, 3))
        return x, x[:, :2]


def images(n: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_files_of_either_kind_give_the_same_features(tmp_path: Path) -> None:
    torch.jit.script(Tiny()).save(str(tmp_path / "tiny net.ts"))
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(Tiny(), (images(2),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "tiny net.pt2")
    scripted, exported = (
        extractor_from_file(str(tmp_path / f"tiny net.{end}"), 32, trusted=True) for end in ("ts", "pt2")
    )
    for n in (1, 5):
        for one, other in zip(scripted(images(n)), exported(images(n)), strict=True):
            torch.testing.assert_close(one, other)
    assert scripted.digest == hashlib.sha256((tmp_path / "tiny net.ts").read_bytes()).hexdigest()
    assert scripted.digest != exported.digest
    assert FRECHET_DISTANCE.name_under(scripted) == "fd_tiny_net"


def test_a_users_file_cannot_take_a_name_that_means_something(tmp_path: Path) -> None:
    torch.jit.script(Tiny()).save(str(tmp_path / "inception.ts"))
    assert (
        FRECHET_DISTANCE.name_under(extractor_from_file(str(tmp_path / "inception.ts"), 32, trusted=True))
        == "fd_inception-file"
    )


def test_what_is_no_extractor_is_refused_with_what_one_is(tmp_path: Path) -> None:
    class Flat(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = images.float()
            return x, x

    (tmp_path / "text.ts").write_text("hello")
    torch.jit.script(Flat()).save(str(tmp_path / "flat.ts"))
    for name in ("text.ts", "flat.ts"):
        with pytest.raises(UsageError, match=name) as caught:
            extractor_from_file(str(tmp_path / name), 32, trusted=True)
        assert "[n, D]" in caught.value.remedy
    with pytest.raises(EnvironmentFault, match=r"no extractor file at .*nowhere\.ts"):
        extractor_from_file(str(tmp_path / "nowhere.ts"), 32)


# --- a file is a program ---------------------------------------------------------------------------------------------


class Marks(torch.nn.Module):
    """Writes a file while it is loaded."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = images.float().mean((2, 3))
        return x, x

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = state[1]
        torch.save(torch.zeros(1), self.path)


class Trap:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def torchscript_trap(folder: Path, mark: Path) -> Path:
    torch.jit.script(Marks(str(mark))).save(str(folder / "trap.ts"))
    return folder / "trap.ts"


def export_trap(folder: Path, mark: Path) -> Path:
    torch.export.save(torch.export.export(Tiny(), (images(2),)), folder / "good.pt2")
    payload = io.BytesIO()
    torch.save(Trap(mark), payload)
    with zipfile.ZipFile(folder / "good.pt2") as good, zipfile.ZipFile(folder / "trap.pt2", "w") as trap:
        for name in good.namelist():
            trap.writestr(name, payload.getvalue() if "sample_inputs" in name else good.read(name))
    return folder / "trap.pt2"


TRAPS = [torchscript_trap, export_trap]


@pytest.mark.parametrize("trap", TRAPS)
def test_a_file_runs_only_where_the_user_trusts_it(trap: Callable[[Path, Path], Path], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = trap(tmp_path, mark)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    evaluate = ["evaluate", "--self-test", "--reference", "nowhere", "--extractor", str(path)]
    with pytest.raises(UsageError, match=f"is a program.*{digest}") as refused:
        extractor_from_file(str(path), 32)
    assert f"evaluate.extractor_sha256: {digest}" in refused.value.remedy
    with pytest.raises(CorruptError, match="another file"):
        extractor_from_file(str(path), 32, sha256=hashlib.sha256(b"what it was").hexdigest())
    with pytest.raises(ConfigError, match="extractor_sha256"):
        CliRunner().invoke(app, [*evaluate, "--extractor-sha256", "12345678"], catch_exceptions=False)
    assert not mark.exists()


@pytest.mark.parametrize("trap", TRAPS)
def test_the_traps_are_traps(trap: Callable[[Path, Path], Path], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with contextlib.suppress(UsageError):
        extractor_from_file(str(trap(tmp_path, mark)), 32, trusted=True)
    assert mark.exists()


def test_a_named_digest_admits_exactly_its_file(tmp_path: Path) -> None:
    path = tmp_path / "tiny.ts"
    torch.jit.script(Tiny()).save(str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert extractor_from_file(str(path), 32, sha256=digest).digest == digest


def test_trust_is_for_files_alone() -> None:
    for key in ({"trust_extractor": True}, {"extractor_sha256": "ab" * 32}):
        with pytest.raises(ValueError, match="apply to a file, not to classifier"):
            EvaluateSection(extractor="classifier", **key)


def test_clip_weights_run_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(UsageError, match="weights of clip-vit-b-32"):
        load_published("clip-vit-b-32", str(torchscript_trap(tmp_path, mark)))
    assert not mark.exists()
