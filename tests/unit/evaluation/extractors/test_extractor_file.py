from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from pipeline.errors import EnvironmentFault, UsageError
from pipeline.evaluation.extractors.extractor_file import extractor_from_file
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
    scripted, exported = (extractor_from_file(str(tmp_path / f"tiny net.{end}"), 32) for end in ("ts", "pt2"))
    for n in (1, 5):
        for one, other in zip(scripted(images(n)), exported(images(n)), strict=True):
            torch.testing.assert_close(one, other)
    assert scripted.digest == hashlib.sha256((tmp_path / "tiny net.ts").read_bytes()).hexdigest()
    assert scripted.digest != exported.digest
    assert FRECHET_DISTANCE.name_under(scripted) == "fd_tiny_net"


def test_a_users_file_cannot_take_a_name_that_means_something(tmp_path: Path) -> None:
    torch.jit.script(Tiny()).save(str(tmp_path / "inception.ts"))
    assert FRECHET_DISTANCE.name_under(extractor_from_file(str(tmp_path / "inception.ts"), 32)) == "fd_inception-file"


def test_what_is_no_extractor_is_refused_with_what_one_is(tmp_path: Path) -> None:
    class Flat(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = images.float()
            return x, x

    (tmp_path / "text.ts").write_text("hello")
    torch.jit.script(Flat()).save(str(tmp_path / "flat.ts"))
    for name in ("text.ts", "flat.ts"):
        with pytest.raises(UsageError, match=name) as caught:
            extractor_from_file(str(tmp_path / name), 32)
        assert "[n, D]" in caught.value.remedy
    with pytest.raises(EnvironmentFault, match=r"no extractor file at .*nowhere\.ts"):
        extractor_from_file(str(tmp_path / "nowhere.ts"), 32)
