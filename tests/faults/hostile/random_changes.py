"""Changes as a hostile or a broken program makes them: of bytes, of JSON values, of tensors and of tars."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from copy import deepcopy
from random import Random
from typing import Any

import numpy as np
import safetensors.numpy

NUMBERS: list[Any] = [
    *(-1, 0, 1, 2, 3, 100, 2**15, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**70, -(2**31), -(2**63)),
    *(0.5, -0.0, 1e-320, 1e38, 1e39, 1e308, -1e308, float("inf"), float("-inf"), float("nan"), 10**400),
]
TEXTS = [
    *(
        "",
        ".",
        "..",
        "a/b.tar",
        "x.lock",
        "-1",
        "1e309",
        "null",
        "0" * 64,
        "f" * 64,
        "a" * 300,
        "\0",
        "\ud800",
        "é" * 99,
    ),
    *("\x1b[2J\x1b[31mred", "line\nline", "\u202etxt.exe", "<script>alert(1)</script>", "[a](javascript:alert(1))"),
    *("%s %d {0}", "${HOME}", "~", "~/x", "C:\\x", "train", "inception", "nan", "1" * 5000),
]


def damaged(data: bytes, random: Random) -> bytes:
    """Return bytes of which some are flipped, set to extreme numbers, inserted, deleted, doubled, moved or cut off."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        most = min(len(changed), 100) if random.random() < 0.5 else len(changed)  # headers decide about sizes
        at = random.randrange(max(1, most))
        size = random.choice((1, 1, 2, 4, 8, 64))
        match random.choice(("flip", "flip", "set", "number", "insert", "delete", "double", "move", "cut")):
            case "flip" if at < len(changed):
                changed[at] ^= 1 << random.randrange(8)
            case "set":
                changed[at : at + size] = random.choice((b"\0", b"\xff", b"\x7f")) * size
            case "number":
                order, kind = random.choice("<>"), random.choice("HIQ")
                limit = 2 ** (8 * struct.calcsize(kind))
                number = random.choice((limit - 1, limit // 2 - 1, limit // 2, 0, 1, 65535)) % limit
                changed[at : at + struct.calcsize(kind)] = struct.pack(order + kind, number)
            case "insert":
                changed[at:at] = random.randbytes(size)
            case "delete":
                del changed[at : at + size]
            case "double":
                changed[at:at] = changed[at : at + random.choice((1, 16, 512))]
            case "move":
                part = changed[at : at + size]
                del changed[at : at + size]
                to = random.randrange(len(changed) + 1)
                changed[to:to] = part
            case _:
                del changed[at:]
    return bytes(changed)


def changed_value(value: Any, random: Random, names: list[str]) -> Any:
    """Return a JSON value of which one to three parts are replaced, moved, repeated, renamed or deleted.

    `names` are texts that lead to files of somebody else.
    """
    whole = [deepcopy(value)]
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = _places(whole)
        container, key = random.choice(places)
        match random.choice(("replace", "replace", "replace", "type", "copy", "swap", "repeat", "rename", "delete")):
            case "replace":
                container[key] = hostile_value(random, names)
            case "type":
                container[key] = _of_another_type(container[key])
            case "copy":
                other, other_key = random.choice(places)
                container[key] = deepcopy(other[other_key])
            case "swap":
                other, other_key = random.choice(places)
                mine, theirs = deepcopy(container[key]), deepcopy(other[other_key])
                container[key] = theirs
                if other_key in _keys(other):
                    other[other_key] = mine
            case "repeat" if isinstance(container, list) and container is not whole:
                container.extend([deepcopy(container[key])] * random.choice((1, 1, 1000)))
            case "rename" if isinstance(container, dict):
                container[str(hostile_value(random, names))] = container.pop(key)
            case _ if container is not whole:
                del container[key]
    return whole[0]


def hostile_value(random: Random, names: list[str]) -> Any:
    """Return a number, text, list or dictionary that a reader does not expect."""
    match random.choice(("number", "number", "text", "name", "empty", "list", "deep")):
        case "number":
            return random.choice(NUMBERS)
        case "text":
            return random.choice(TEXTS)
        case "name":
            return random.choice(names)
        case "empty":
            return random.choice((None, True, False, [], {}))
        case "list":
            return [random.choice(NUMBERS), random.choice(TEXTS), None][: random.randrange(4)]
        case _:
            value: Any = random.choice(TEXTS)
            for _ in range(random.choice((2, 40, 200))):
                value = [value] if random.random() < 0.5 else {"a": value}
            return value


def changed_json(data: bytes, random: Random, names: list[str]) -> bytes:
    """Return the bytes of a JSON file with other values, or damaged bytes."""
    if random.random() < 0.25:
        return damaged(data, random)
    if random.random() < 0.05:
        return random.choice((b"", b"null", b"[]", b"1", b"[" * 100_000, b'{"a":' * 100_000, data + data, b"NaN"))
    try:
        value = json.loads(data)
    except ValueError:  # it was changed before
        return damaged(data, random)
    return json.dumps(changed_value(value, random, names), indent=random.choice((None, 1))).encode()


def changed_tensors(data: bytes, random: Random, names: list[str]) -> bytes:
    """Return the bytes of a safetensors file with other tensors, another header, or damaged bytes."""
    kind = random.choice(("values", "values", "tensors", "tensors", "header", "bytes"))
    if kind == "bytes":
        return damaged(data, random)
    if kind == "header":
        size = int.from_bytes(data[:8], "little")
        header = json.dumps(changed_value(json.loads(data[8 : 8 + size]), random, names)).encode()
        return len(header).to_bytes(8, "little") + header + data[8 + size :]
    columns = {name: column.copy() for name, column in safetensors.numpy.load(data).items()}
    for _ in range(random.randint(1, 3)):
        name = random.choice(sorted(columns))
        column = columns[name]
        if kind == "values":
            _change_values(column, random)
            continue
        match random.choice(("type", "cut", "shape", "delete", "rename", "swap")):
            case "type":
                with np.errstate(all="ignore"):
                    columns[name] = column.astype(random.choice(("i1", "i4", "i8", "u8", "f2", "f4", "f8", "?")))
            case "cut" if column.ndim:
                columns[name] = np.ascontiguousarray(column[: random.randint(0, len(column))])
            case "shape":
                columns[name] = column.reshape(random.choice(((1, *column.shape), (-1,), (*column.shape, 1))))
            case "rename":
                columns[random.choice(("other", *columns))] = columns.pop(name)
            case "swap":
                other = random.choice(sorted(columns))
                columns[name], columns[other] = columns[other], columns[name]
            case _ if len(columns) > 1:
                del columns[name]
    return safetensors.numpy.save(columns)


def changed_tar(data: bytes, random: Random, names: list[str]) -> bytes:
    """Return a tar with other headers, other members or damaged bytes."""
    kind = random.choice(("bytes", "field", "members", "members"))
    if kind == "bytes":
        return damaged(data, random)
    if kind == "field":
        return _with_changed_header(data, random)
    out = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(data)) as old,
        tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        members = old.getmembers()
        victim = random.randrange(len(members))
        for i, member in enumerate(members):
            content = old.extractfile(member).read() if member.isreg() else b""  # type: ignore[union-attr]
            if i == victim:
                _change_member(member, random, [m.name for m in members], names)
                content = b"" if not member.isreg() else content
            for _ in range(2 if i == victim and random.random() < 0.2 else 1):
                member.size = len(content)
                new.addfile(member, io.BytesIO(content))
    return out.getvalue()


def changed_image(data: bytes, random: Random) -> bytes:
    """Return a damaged image file, or a PNG whose header gives another size or kind of pixels."""
    if data[:4] == b"\x89PNG" and random.random() < 0.3:
        header = bytearray(data[16:29])
        if random.random() < 0.5:
            side = random.choice((0, 1, 31, 33, 9000, 65535, 2**24, 2**31 - 1))
            struct.pack_into(">I", header, random.choice((0, 4)), side)
        else:
            header[random.randrange(8, 13)] = random.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
        return data[:16] + bytes(header) + struct.pack(">I", zlib.crc32(data[12:16] + header)) + data[33:]
    return damaged(data, random)


# --- parts -----------------------------------------------------------------------------------------------------------


def _keys(container: Any) -> list[Any]:
    if isinstance(container, dict):
        return list(container)
    return list(range(len(container))) if isinstance(container, list) else []


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return every container inside a JSON value with each of its keys."""
    places = [(value, key) for key in _keys(value)]
    for container, key in places:  # grows
        places += [(container[key], inner) for inner in _keys(container[key])]
    return places


def _of_another_type(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, str):
        return [value]
    return {"value": value} if isinstance(value, list) else str(value)


def _change_values(column: np.ndarray, random: Random) -> None:
    if not column.size:
        return
    if column.dtype.kind == "f":
        extreme = [np.nan, np.inf, -np.inf, 0.0, -1.0, float(np.finfo(column.dtype).max)]
    elif column.dtype.kind in "iu":
        limits = np.iinfo(column.dtype)
        extreme = [value for value in (limits.min, limits.max, -1, 0, 1, 2, 512) if limits.min <= value <= limits.max]
    else:
        extreme = [0, 1]
    value = random.choice(extreme)
    if random.random() < 0.2:
        column[...] = value
    else:
        column.flat[random.randrange(column.size)] = value


def _with_changed_header(data: bytes, random: Random) -> bytes:
    """Change a field of a tar header, and correct the sum of the header."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        at = random.choice(tar.getmembers()).offset
    header = bytearray(data[at : at + 512])
    first, size = random.choice(((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155)))
    if size == 1:
        header[first] = random.choice(b"0123457gxLKSDM\0")
    elif first == 124:
        header[first : first + size] = random.choice(
            (b"77777777777\0", b"-0000000001\0", b"00000000000\0", b"\x80" + b"\0" * 3 + b"\xff" * 8, b"\xff" * 12)
        )
    else:
        header[first : first + size] = random.randbytes(size)
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return data[:at] + bytes(header) + data[at + 512 :]


def _change_member(member: tarfile.TarInfo, random: Random, siblings: list[str], names: list[str]) -> None:
    match random.choice(("name", "sibling", "type", "pax", "sparse")):
        case "name":
            member.name = random.choice(
                [*names, "a" * 300, "\x1b[2J.png", "..", "./x.png", ".png", "a.b.c.png", "\ud800"]
            )
            member.name = member.name.encode(errors="replace").decode()
        case "sibling":
            member.name = random.choice(siblings)
        case "type":
            member.type = random.choice(
                (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
            )
            member.linkname = random.choice([*siblings, *names, member.name])
        case "pax":
            member.pax_headers = {
                random.choice(("size", "path", "mtime", "uid")): random.choice(("-1", "9" * 30, "x", "../x"))
            }
        case _:
            member.pax_headers = {
                "GNU.sparse.major": "1",
                "GNU.sparse.minor": "0",
                "GNU.sparse.realsize": random.choice(("2000000000", "-1", "x")),
                "GNU.sparse.name": member.name,
            }
