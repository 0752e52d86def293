"""Tables whose rows give the path and the label of an image, and the columns of Parquet files.

`TABLE#COLUMN` names the column of labels where a table has several: `celeba/list_attr_celeba.txt#Smiling`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from pipeline.errors import UsageError
from pipeline.packing.archives_and_folders import IMAGES, Place, Tree, suffix
from pipeline.packing.image_source import Row, Source, source_of
from pipeline.storage import files

_PATHS = ("path", "file", "filename", "file_name", "image", "image_id", "image_path")
_IMAGES = ("image", "img", "jpg", "png", "webp", "pixel_values")
_LABELS = ("label", "labels", "class", "cls", "category", "target", "fine_label")


def is_table(url: str) -> bool:
    """Return whether a URL is a table by its suffix. A Parquet file is a table where it contains no images."""
    name, _, column = url.partition("#")
    if suffix(name) != ".parquet":
        return suffix(name) in (".csv", ".tsv", ".txt")
    return bool(column) or not _binary(schema(name))


def read(url: str) -> Source:
    """Read images that the rows of a table name.

    A path is relative to the table's folder, or it is the name of one file anywhere below that folder. A column that
    is named by `#COLUMN` and holds only −1, 0 and 1 is an attribute. It gives two classes: COLUMN and "not COLUMN".

    Raises UsageError where the table is missing, its columns are unclear, or an image is missing. Raises
    EnvironmentFault where storage fails.
    """
    url, _, wanted = url.partition("#")
    header, rows = _rows(url)
    path_column = next((i for i, name in enumerate(header) if name.lower() in _PATHS), 0)
    label_column = _label_column(url, header, path_column, wanted)
    tree = Tree.open(url.rpartition("/")[0] or ".")
    by_name: dict[str, list[str]] = {}
    for path in tree.images:
        by_name.setdefault(PurePosixPath(path).name, []).append(path)

    def place(path: str) -> Place:
        matches = [path] if path in tree.places else by_name.get(PurePosixPath(path).name, [])
        if len(matches) != 1:
            raise UsageError(
                f"{url} names {path!r}, but there are {len(matches)} images of this name below its folder",
                "give paths relative to the table",
            )
        return tree.places[matches[0]]

    labels = [row[label_column] for row in rows]
    if set(labels) <= {"-1", "0", "1"} and wanted:  # an attribute that an image has or lacks
        labels = [wanted if label == "1" else f"not {wanted}" for label in labels]
    paths = [row[path_column] for row in rows]
    images = [Row(path, place(path), label, "train") for path, label in zip(paths, labels, strict=True)]
    return source_of("table", images, by_number(labels))


def by_number(labels: Iterable[str]) -> list[str] | None:
    """Return the distinct labels in numeric order where all of them are numbers, else None."""
    classes = set(labels)
    return sorted(classes, key=int) if all(label.isdigit() for label in classes) else None


def columns(url: str, schema: Any) -> tuple[str, str | None]:
    """Return the names of the column of images and of the column of labels of a Parquet file.

    The second is None where there are no labels. Raises UsageError where there is no column of images.
    """
    binary = _binary(schema)
    if not binary:
        raise UsageError(f"{url} has no column of images (columns: {', '.join(schema.names)})", "give another source")
    image = next((name for name in _IMAGES if name in binary), binary[0])
    return image, next((name for name in _LABELS if name in schema.names), None)


def class_names(schema: Any) -> list[str] | None:
    """Return the class names, by label, that Hugging Face stores in a Parquet file's schema; None without them."""
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features", {})
    return next((features[name]["names"] for name in _LABELS if "names" in features.get(name, {})), None)


def _binary(schema: Any) -> list[str]:
    """Return the names of the columns that hold bytes or {bytes, path}."""
    import pyarrow as pa

    def holds_bytes(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(inner.name == "bytes" for inner in kind)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    return [column.name for column in schema if holds_bytes(column.type)]


def schema(url: str) -> Any:
    """Return the Arrow schema of a Parquet file. Raises UsageError where there is no file, EnvironmentFault."""
    import pyarrow.parquet as pq

    try:
        with files.reading(url) as file:
            return pq.ParquetFile(file).schema_arrow
    except FileNotFoundError:
        raise UsageError(f"{url} does not exist", "correct the path or URL") from None


def _rows(url: str) -> tuple[list[str], list[list[str]]]:
    """Return the names of a table's columns, and its rows as text. Without a header the columns are path and label."""
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
    if rows and len(rows[0]) == 1:  # CelebA's tables begin with the number of rows
        rows = rows[1:]
    if len(rows) < 2 or suffix(rows[0][0]) in IMAGES:
        header = ["path", "label"]
    else:
        header, rows = rows[0], rows[1:]
        header = [*["path"] * (len(rows[0]) - len(header)), *header]  # CelebA's header does not name the path
    if any(len(row) != len(header) for row in rows):
        bad = next(row for row in rows if len(row) != len(header))
        raise UsageError(
            f"{url}: row {bad} has {len(bad)} values, but the table has {len(header)} columns: {', '.join(header)}",
            "correct the table",
        )
    return header, rows


def _label_column(url: str, header: list[str], path_column: int, wanted: str) -> int:
    """Return the number of the column of labels. Raises UsageError where it is unclear."""
    if wanted in header:
        return header.index(wanted)
    known = [i for i, name in enumerate(header) if name.lower() in _LABELS and i != path_column]
    if len(header) == 2 or known:
        chosen = known[0] if known else 1 - path_column
        if not wanted:
            return chosen
    raise UsageError(
        f"{url}: {f'it has no column {wanted!r}' if wanted else 'several columns could be the label'}; "
        f"its columns: {', '.join(header)}",
        f"name the column of labels, for example {url}#{header[-1]}",
    )
