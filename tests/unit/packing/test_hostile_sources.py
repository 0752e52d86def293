"""What others wrote is data: no image, tar or pickle of a source runs a program or takes memory without bounds."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.collection.image_codec import FORMATS, crop_and_encode
from pipeline.config.schema import PackSection
from pipeline.errors import UsageError
from pipeline.packing.archives_and_folders import IMAGES
from pipeline.packing.pack import pack
from pipeline.packing.recognise import open_source
from tests.unit.packing.coloured_images import picture, tar, write

CHECKOUT = Path(__file__).parents[3]


PACKING = """
import os, resource, sys
import pipeline.collection.preview, pipeline.job_runner, pipeline.packing.pack, pyarrow.parquet
from pipeline.cli import main
memory, *sources = sys.argv[1:]
for source in sources:
    if not (child := os.fork()):
        os.dup2(os.open(f"{source}.error", os.O_WRONLY | os.O_CREAT), 2)
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + int(memory)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        sys.argv = ["sagan", "pack", source, f"{source}.packed", "--resolution", "32"]
        try:
            main()
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(end.code)  # at once: the memory of all modules is shared with the parent
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def require_refused(memory: int, *sources: Path) -> list[str]:
    """Run `sagan pack` on each source, and return the errors, with which it must end.

    Each process may take `memory` bytes more than it has after its imports.
    """
    command = [sys.executable, "-c", PACKING, str(memory), *map(str, sources)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT, check=True)
    errors = [Path(f"{source}.error").read_text() for source in sources]
    assert [line for line in done.stdout.split("\n") if line.isdigit()] == ["2"] * len(sources), errors
    return errors


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n"


def file_of(kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 40), (255, 0, 0)).save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [EPS, b"%PDF-1.4\n", b"\xd7\xcd\xc6\x9a" + bytes(100), file_of("TGA"), file_of("ICO"), file_of("PCX")],
    ids=["EPS", "PDF", "WMF", "TGA", "ICO", "PCX"],
)
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.jfif"])
def test_a_format_that_is_not_listed_is_no_image_by_any_name(data: bytes, name: str, tmp_path: Path) -> None:
    """A program called gs in the PATH would be started for an EPS file."""
    write(tmp_path, {"set/a/1.png": picture(1), f"set/a/{name}": data})
    with pytest.raises(UsageError, match=f"a/{name}: not an image of a format that can be read"):
        pack(f"{tmp_path}/out", PackSection(source=f"{tmp_path}/set", resolution=32))


def test_every_suffix_of_an_admitted_format_is_an_image(tmp_path: Path) -> None:
    """The file behind the suffix may have any of the formats."""
    kinds = {kind: file_of(kind) for kind in FORMATS}
    assert {".jpg", ".jfif", ".png", ".webp", ".avif", ".tif", ".pnm", ".jp2"} <= IMAGES
    names = {f"{kind}{suffix}": data for suffix in IMAGES for kind, data in kinds.items()}
    write(tmp_path / "set", {f"a/{name}": data for name, data in names.items()})
    assert pack(f"{tmp_path}/out", PackSection(source=f"{tmp_path}/set", resolution=32)).size("train") == len(names)


def header_only(width: int, height: int, bits: int) -> bytes:
    """A PNG of few bytes whose pixels need much memory."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = zlib.compress(bytes((width * bits // 8 + 1) * height), 9)
    ihdr = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_pixels_are_counted_before_memory_is_taken(tmp_path: Path) -> None:
    sizes = [(9400, 9400, 16), (9000, 9000, 8), (1, 65_000_000, 8)]
    sources = [
        write(tmp_path / f"{n}", {"a/1.png": picture(1), "a/2.png": header_only(*size)}) for n, size in enumerate(sizes)
    ]
    for (width, height, _), error in zip(sizes, require_refused(500_000_000, *sources), strict=True):
        assert f"a/2.png: the image has {width} x {height} pixels, more than max_pixels allows (64," in error


def test_max_pixels_is_a_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="more than max_pixels allows"):
        crop_and_encode(picture(1), 32, "png", max_pixels=63)
    section = PackSection(source=str(write(tmp_path / "set", {"1.png": picture(1)})), resolution=32, max_pixels=63)
    with pytest.raises(UsageError, match="more than max_pixels allows"):
        pack(f"{tmp_path}/out", section)
    assert pack(f"{tmp_path}/out", section.model_copy(update={"max_pixels": 64})).size("train") == 1


def sparse_tar(path: Path, name: str, size: int) -> None:
    """A tar with a sparse member of `size` bytes in GNU's old format, 512 bytes of it stored."""
    member = tarfile.TarInfo(name)
    member.size, member.type = 512, tarfile.GNUTYPE_SPARSE
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"%011o\0" % 0 + b"%011o\0" % 512
    block[483:495] = b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    good = tar({"0.png": picture(0), "0.cls": b"0", "1.png": picture(1)}).rstrip(b"\0")
    good += bytes(-len(good) % 512)
    path.write_bytes(good + bytes(block) + b"1" * 512 + bytes(1024))


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    names = ["1.cls", "2.png", "1.json"]
    sources = [tmp_path / f"{name}-0.tar" for name in names]
    for name, source in zip(names, sources, strict=True):
        sparse_tar(source, name, 2 * 10**9)
    for name, error in zip(names, require_refused(500_000_000, *sources), strict=True):
        assert f"{name} is sparse" in error


def test_a_label_of_megabytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set-0.tar").write_bytes(tar({"0.png": picture(0), "0.cls": b"1" * 1_000_001}))
    with pytest.raises(UsageError, match=r"0\.cls holds no label: the file has 1,000,001 bytes"):
        open_source(f"{tmp_path}/set-0.tar")


def test_an_image_of_gigabytes_is_broken(tmp_path: Path) -> None:
    write(tmp_path, {"set/a/1.png": picture(1), "set/a/2.png": b""})
    with (tmp_path / "set" / "a" / "2.png").open("r+b") as file:
        file.truncate(2 * 10**9)
    with pytest.raises(UsageError, match=r"a/2\.png: the file has 2,000,000,000 bytes, more than the limit"):
        pack(f"{tmp_path}/out", PackSection(source=f"{tmp_path}/set", resolution=32))


def test_tars_in_tars_have_an_end(tmp_path: Path) -> None:
    data = tar({"1.png": picture(1)})
    for n in range(50):
        data = tar({f"{n}.tar": data})
    (tmp_path / "set.tar").write_bytes(data)
    with pytest.raises(UsageError, match="is a tar in more than 8 tars"):
        open_source(f"{tmp_path}/set.tar")


def test_a_path_of_a_tar_has_an_end(tmp_path: Path) -> None:
    (tmp_path / "set.tar").write_bytes(tar({"a/1.png": picture(1), "a/" * 5000 + "2.png": picture(2)}))
    assert open_source(f"{tmp_path}/set.tar").keys == ["a/1.png"]


def test_a_bomb_in_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    sources = [tmp_path / f"{name}.tar.gz" for name in ("data_batch_1", "notes.bin")]
    for source in sources:
        member = tarfile.TarInfo(source.name.removesuffix(".tar.gz"))
        member.size = 2_800_000_000
        with gzip.open(source, "wb", compresslevel=1) as file:
            file.write(member.tobuf())
            for _ in range(40):
                file.write(bytes(10_000_000))
    for error in require_refused(1_000_000_000, *sources):
        assert "not CIFAR: it has more than 300,000,000 bytes" in error


class TestPickles:
    """CIFAR's batches are pickles. No class that they name is ever called."""

    @staticmethod
    def good() -> dict[str, Any]:
        return {"labels": [0, 1], "filenames": ["a.png", "b.png"], "data": np.full((2, 3072), 7, dtype=np.uint8)}

    @staticmethod
    def source(folder: Path, batch: bytes, protocol: int = 2) -> str:
        meta = pickle.dumps({"label_names": ["cat", "dog"]}, protocol=protocol)
        return str(write(folder / "cifar", {"data_batch_1": batch, "batches.meta": meta}))

    @pytest.mark.parametrize("protocol", range(6))
    @pytest.mark.parametrize("order", ["C", "F"])
    def test_arrays_of_every_protocol_are_read(self, protocol: int, order: Any, tmp_path: Path) -> None:
        data = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
        batch = self.good() | {"data": np.array(data, order=order)}
        source = open_source(self.source(tmp_path, pickle.dumps(batch, protocol=protocol), protocol))
        pixels = np.asarray(Image.open(io.BytesIO(source.read(1))))
        np.testing.assert_array_equal(pixels, data[1].reshape(3, 32, 32).transpose(1, 2, 0))

    @pytest.mark.parametrize(
        "change",
        [
            {"data": np.array([None, 1], dtype=object)},
            {"data": np.zeros((2, 3072), dtype=np.float32)},
            {"data": np.zeros((1, 3072), dtype=np.uint8)},
            {"data": np.zeros((2, 3071), dtype=np.uint8)},
            {"data": np.zeros(2 * 3072, dtype=np.uint8)},
            {"data": [1, 2]},
            {"labels": [0, 2]},
            {"labels": [0, -1]},
            {"labels": [0]},
            {"labels": [0, "1"]},
            {"filenames": ["a.png"]},
            {"filenames": [1, 2]},
        ],
    )
    def test_a_batch_of_another_form_is_refused(self, change: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="CIFAR is incomplete or damaged"):
            open_source(self.source(tmp_path, pickle.dumps(self.good() | change)))

    def test_raw_pointers_stay_bytes(self, tmp_path: Path) -> None:
        """NumPy would take the bytes of an array of objects for pointers."""
        batch = pickle.dumps(self.good(), protocol=2)
        assert batch.count(b"u1q") == 1
        with pytest.raises(UsageError, match="no array of bytes"):
            open_source(self.source(tmp_path, batch.replace(b"u1q", b"O8q")))

    def test_a_damaged_pickle_is_refused(self, tmp_path: Path) -> None:
        damaged = [b"", b".", b"}", b"]r\xff\xff\xff\x7f.", b"}p999999999999\n."]
        damaged += [b"\x80\x02cos\nsystem\n.", b"(" * 100_000 + b"."]
        sources = [Path(self.source(tmp_path / f"{n}", data)) for n, data in enumerate(damaged)]
        for error in require_refused(500_000_000, *sources):
            assert "CIFAR" in error

    def test_a_pickle_of_another_kind_loads_nothing(self, tmp_path: Path) -> None:
        for name in ("os.system", "builtins.eval", "numpy.load", "numpy.core.multiarray.scalar"):
            module, _, attribute = name.rpartition(".")
            batch = b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b"X\x01\x00\x00\x00x\x85R."
            with pytest.raises(UsageError, match=f"would load {name}"):
                open_source(self.source(tmp_path, batch))
