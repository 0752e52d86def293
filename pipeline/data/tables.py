"""Tables: rows of path and label that say which class an image in a folder has, and columns of Parquet files.

`TABLE#COLUMN` names the column of the labels where there are several: `celeba/list_attr_celeba.txt#Smiling`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from pipeline.data.tree import IMAGES, Place, Row, Source, Tree, source_of, suffix
from pipeline.errors import UsageError
from pipeline.storage import files

_PATHS = ("path", "file", "filename", "file_name", "image", "image_id", "image_path")
_IMAGES = ("image", "img", "jpg", "png", "webp", "pixel_values")
_LABELS = ("label", "labels", "class", "cls", "category", "target", "fine_label")


def is_table(url: str) -> bool:
    """Whether it is one by its name; of a Parquet file, whether it has no images inside."""
    name, _, column = url.partition("#")
    if suffix(name) != ".parquet":
        return suffix(name) in (".csv", ".tsv", ".txt")
    return bool(column) or not _binary(schema(name))


def read(url: str) -> Source:
    """Images by a table's rows; paths are relative to the table, or names of files anywhere below its folder.

    Raises UsageError where the table is missing, its columns are unclear, or an image is missing; EnvironmentFault.
    """
    url, _, wanted = url.partition("#")
    header, rows = _rows(url)
    path_column = next((i for i, name in enumerate(header) if name.lower() in _PATHS), 0)
    label_column = _label_column(url, header, path_column, wanted)
    tree = Tree.open(url.rpartition("/")[0] or ".")
    by_name: dict[str, list[str]] = {}
    for path in tree.images:
        by_name.setdefault(PurePosixPath(path).name, []).append(path)

    def place(given: str) -> Place:
        found = [given] if given in tree.places else by_name.get(PurePosixPath(given).name, [])
        if len(found) != 1:
            raise UsageError(
                f"{url} names {given!r}, of which there are {len(found)} below its folder",
                "give paths relative to the table",
            )
        return tree.places[found[0]]

    labels = [row[label_column] for row in rows]
    if set(labels) <= {"-1", "0", "1"} and wanted:  # an attribute that an image has or has not
        labels = [wanted if label == "1" else f"not {wanted}" for label in labels]
    paths = [row[path_column] for row in rows]
    found = [Row(path, place(path), label, "train") for path, label in zip(paths, labels, strict=True)]
    return source_of("table", found, by_number(labels))


def by_number(labels: Iterable[str]) -> list[str] | None:
    """The classes in the order of their numbers, where they are numbers."""
    classes = set(labels)
    return sorted(classes, key=int) if all(label.isdigit() for label in classes) else None


def columns(url: str, schema: Any) -> tuple[str, str | None]:
    """The columns of images and of labels (None) of a Parquet file. Raises UsageError where there are no images."""
    binary = _binary(schema)
    if not binary:
        raise UsageError(f"{url} has no column of images (columns: {', '.join(schema.names)})", "give another source")
    image = next((name for name in _IMAGES if name in binary), binary[0])
    return image, next((name for name in _LABELS if name in schema.names), None)


def class_names(schema: Any) -> list[str] | None:
    """The names that Hugging Face keeps beside the column of labels, in the order of their numbers."""
    stated = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = stated.get("info", {}).get("features", {})
    return next((features[name]["names"] for name in _LABELS if "names" in features.get(name, {})), None)


def _binary(schema: Any) -> list[str]:
    """Columns of bytes, or of {bytes, path}."""
    import pyarrow as pa

    def holds_bytes(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(inner.name == "bytes" for inner in kind)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    return [column.name for column in schema if holds_bytes(column.type)]


def schema(url: str) -> Any:
    """The columns of a Parquet file. Raises UsageError where there is none, EnvironmentFault."""
    import pyarrow.parquet as pq

    try:
        with files.reading(url) as file:
            return pq.ParquetFile(file).schema_arrow
    except FileNotFoundError:
        raise UsageError(f"{url} does not exist", "correct the path or URL") from None


def _rows(url: str) -> tuple[list[str], list[list[str]]]:
    """Names of the columns, and rows of text. A table without a header has two columns, path and label."""
    try:
        data = files.read_bytes(url)
    except FileNotFoundError:
        raise UsageError(f"{url} does not exist", "correct the path or URL") from None
    if suffix(url) == ".parquet":
        import pyarrow.parquet as pq

        table = pq.read_table(io.BytesIO(data))
        return table.column_names, [[str(value) for value in row.values()] for row in table.to_pylist()]
    lines = io.StringIO(data.decode("utf-8-sig"), newline="")
    if suffix(url) == ".csv":
        rows = [row for row in csv.reader(lines) if row]
    else:
        rows = [line.split("\t") if "\t" in line else line.split() for line in lines.read().splitlines() if line]
    if rows and len(rows[0]) == 1:  # CelebA's begin with the number of rows
        rows = rows[1:]
    if len(rows) < 2 or suffix(rows[0][0]) in IMAGES:
        header = ["path", "label"]
    else:
        header, rows = rows[0], rows[1:]
        header = [*["path"] * (len(rows[0]) - len(header)), *header]  # CelebA's header does not name the path
    if any(len(row) != len(header) for row in rows):
        bad = next(row for row in rows if len(row) != len(header))
        raise UsageError(f"{url}: {bad} has not the {len(header)} columns {', '.join(header)}", "correct the table")
    return header, rows


def _label_column(url: str, header: list[str], path_column: int, wanted: str) -> int:
    if wanted in header:
        return header.index(wanted)
    known = [i for i, name in enumerate(header) if name.lower() in _LABELS and i != path_column]
    if len(header) == 2 or known:
        chosen = known[0] if known else 1 - path_column
        if not wanted:
            return chosen
    raise UsageError(
        f"{url}: {f'there is no column {wanted!r}' if wanted else 'which column is the label?'} "
        f"It has: {', '.join(header)}",
        f"name it: {url}#{header[-1]}",
    )
