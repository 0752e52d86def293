"""Sources of `sagan pack` as foreign inputs: image files, tables, tars, labels, and layouts of published data sets."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tests.faults.hostile.kind import Kind, Names, change_json_file, command, one_of, picture, rewrite, write_photos
from tests.faults.hostile.packed_collections import is_packed, pack_and_verify
from tests.faults.hostile.random_changes import changed_image, changed_json, changed_tar, damaged, hostile_value

FORMATS: dict[str, dict[str, Any]] = {
    "png": {},
    "jpg": {},
    "webp": {"lossless": True},
    "bmp": {},
    "gif": {},
    "tiff": {"compression": "tiff_lzw"},
    "ppm": {},
    "jp2": {},
    "avif": {},
}


def _change_photo(folder: Path, random: Random, names: Names) -> None:
    rewrite(one_of(folder, "*/changed.*", random), changed_image, random)


def _change_csv(folder: Path, random: Random, names: Names) -> None:
    path = folder / "table.csv"
    text = path.read_text()
    cells = [*names, "\x1b[2J", '"', '""', ",", "\n", "\0", "-1", "1e309", "9" * 400, "x" * 140_000, "\ufeff", "=1"]
    match random.choice(("bytes", "cell", "cell", "line", "encoding")):
        case "bytes":
            rewrite(path, damaged, random)
        case "cell":
            lines = [line.split(",") for line in text.split("\n")]
            line = random.choice(lines)
            line[random.randrange(len(line))] = random.choice(cells)
            path.write_bytes("\n".join(map(",".join, lines)).encode(errors="surrogatepass"))
        case "line":
            lines_ = text.split("\n")
            at = random.randrange(len(lines_))
            lines_[at : at + random.randrange(2)] = [random.choice([*cells, *lines_])] * random.choice((1, 2, 500))
            path.write_bytes("\n".join(lines_).encode())
        case _:
            path.write_bytes(text.encode(random.choice(("utf-16", "utf-16-le", "utf-32", "utf-7", "cp037"))))


def _change_parquet(folder: Path, random: Random, names: Names) -> None:
    """Damage the file, or write it anew with other values and types."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "images.parquet"
    if random.random() < 0.6:
        rewrite(path, damaged, random)
        return
    table = pq.read_table(path)
    rows = table.to_pylist()
    metadata = dict(table.schema.metadata or {})
    for _ in range(random.randint(1, 2)):
        row = random.choice(rows)
        match random.choice(("image", "label", "labels", "metadata", "column")):
            case "image":
                row["image"] = {
                    "bytes": changed_image(row["image"]["bytes"] or b"", random),
                    "path": random.choice(names),
                }
            case "label":
                row["label"] = random.choice((-1, 2, 10**8, None, 2**62))
            case "labels":
                values = random.choice(
                    (["a", "b"], [0.5, 1.5], [True, False], [[1], [2]], [None, None], [{"a": 1}] * 2)
                )
                for i, each in enumerate(rows):
                    each["label"] = values[i % 2]
                break
            case "metadata":
                metadata[b"huggingface"] = changed_json(metadata[b"huggingface"], random, names)
            case _:
                old, new = random.choice(("image", "label")), random.choice(("img", "labels", "image", "x", "\x1b[2J"))
                rows = [{(new if key == old else key): value for key, value in each.items()} for each in rows]
                break
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(metadata), path)


def _change_tar(folder: Path, random: Random, names: Names) -> None:
    rewrite(folder / "photos.tar", changed_tar, random, names)


def _change_labels(folder: Path, random: Random, names: Names) -> None:
    """Write another label into a shard."""
    path = one_of(folder, "*.tar", random)
    texts = [*names, *map(str, (-1, -7, 99, 10**8, 2**70, True, 1.5, "nan", "\x1b[2J", "", "1" * 5000, "\0", "é"))]
    with tarfile.open(path) as old:
        members = [(m.name, old.extractfile(m).read()) for m in old.getmembers()]  # type: ignore[union-attr]
    at = random.choice([i for i, (name, _) in enumerate(members) if name.endswith((".cls", ".json"))])
    name, data = members[at]
    if name.endswith(".json"):
        data = changed_json(data, random, names)
    else:
        data = damaged(data, random) if random.random() < 0.3 else random.choice(texts).encode()
    if random.random() < 0.1:
        data = bytes(1_000_001)
    members[at] = (name, data)
    path.write_bytes(_tar(members))


def _change_cifar(folder: Path, random: Random, names: Names) -> None:
    path = one_of(folder / "cifar-10-batches-py", "*", random)
    if random.random() < 0.6:
        rewrite(path, damaged, random)
        return
    content = pickle.loads(path.read_bytes())
    key = random.choice(sorted(content))
    content[key] = random.choice(
        (
            hostile_value(random, names),
            np.zeros((2, 3072), "O"),
            np.zeros((2, 3072), "f8"),
            np.zeros(0, "u1"),
            [1, -1],
            Path(),
        )
    )
    path.write_bytes(pickle.dumps(content, protocol=random.choice((0, 1, 2, 4))))


def _tar(members: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def build(root: Path) -> None:
    """Write the clean sources below `root`."""
    for extension, options in FORMATS.items():
        write_photos(root / f"photos-{extension}", 2)
        changed = picture(99, 40, extension, **options)
        (root / f"photos-{extension}" / "ant" / f"changed.{extension}").write_bytes(changed)
    table = root / "table"
    write_photos(table / "images", 3)
    rows = [f"images/{('ant', 'bee')[n % 2]}/{n}.png,{('ant', 'bee')[n % 2]}" for n in range(3)]
    (table / "table.csv").write_text("\n".join(["path,label", *rows]) + "\n")

    import pyarrow as pa
    import pyarrow.parquet as pq

    (root / "parquet").mkdir()
    images = [{"image": {"bytes": picture(n), "path": f"{n}.png"}, "label": n % 2} for n in range(3)]
    features = {"info": {"features": {"label": {"names": ["ant", "bee"]}}}}
    content = pa.Table.from_pylist(images).replace_schema_metadata({b"huggingface": json.dumps(features).encode()})
    pq.write_table(content, root / "parquet" / "images.parquet")

    (root / "shards").mkdir()
    members = [part for n in range(3) for part in ((f"{n}.png", picture(n)), (f"{n}.cls", str(n % 2).encode()))]
    members += [("3.png", picture(3)), ("3.json", b'{"label": 1, "text": "x"}')]
    (root / "shards" / "00000.tar").write_bytes(_tar(members))
    (root / "tar").mkdir()
    files = [(f"{('ant', 'bee')[n % 2]}/{n}.png", picture(n)) for n in range(3)]
    (root / "tar" / "photos.tar").write_bytes(_tar([*files, ("bee/inner.tar", _tar([("4.png", picture(4))]))]))

    write_photos(root / "stylegan" / "00000", 3)
    labels = [[str(path.relative_to(root / "stylegan")), i % 2] for i, path in enumerate(root.glob("stylegan/*/*/*"))]
    (root / "stylegan" / "dataset.json").write_text(json.dumps({"labels": labels}))

    cifar = root / "cifar" / "cifar-10-batches-py"
    cifar.mkdir(parents=True)
    for name in ("data_batch_1", "test_batch"):
        pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
        batch = {"data": pixels, "labels": [0, 1], "filenames": [f"{name}-{i}.png" for i in range(2)]}
        (cifar / name).write_bytes(pickle.dumps(batch, protocol=2))
    (cifar / "batches.meta").write_bytes(pickle.dumps({"label_names": ["ant", "bee"]}, protocol=2))


_IMAGES, _TABLES = "images of sources (9 formats)", "tables (CSV, Parquet)"
_OTHERS = "tars, labels, dataset.json, CIFAR"
_INDEX = command("pack IN --index-only", "verify IN")
KINDS = {
    **{
        f"image {name}": Kind(_IMAGES, 4, f"photos-{name}", _change_photo, pack_and_verify(), is_packed)
        for name in FORMATS
    },
    "table csv": Kind(_TABLES, 6, "table", _change_csv, pack_and_verify("IN/table.csv"), is_packed),
    "parquet": Kind(_TABLES, 8, "parquet", _change_parquet, pack_and_verify("IN/images.parquet"), is_packed),
    "tar of images": Kind(_OTHERS, 6, "tar", _change_tar, pack_and_verify("IN/photos.tar"), is_packed),
    "labels": Kind(_OTHERS, 6, "shards", _change_labels, pack_and_verify(), is_packed),
    "labels, indexed": Kind(_OTHERS, 4, "shards", _change_labels, _INDEX, is_packed),
    "dataset.json": Kind(_OTHERS, 4, "stylegan", change_json_file("dataset.json"), pack_and_verify(), is_packed),
    "cifar": Kind(_OTHERS, 4, "cifar", _change_cifar, pack_and_verify(), is_packed),
}
