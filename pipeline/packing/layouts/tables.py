"""Tables whose rows give the path and the label of an image, and the columns of Parquet files.

`TABLE#COLUMN` names the column of labels where a table has several: `celeba/list_attr_celeba.txt#Smiling`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from posixpath import splitext
from typing import Any

from pipeline.errors import UsageError
from pipeline.packing.archives_and_folders import IMAGES, Tree, require_no_pointer, suffix
from pipeline.packing.image_source import Row, Source, source_of, tally
from pipeline.storage import files
from pipeline.storage.validate_json import printable

_PATHS = ("path", "file", "filename", "file_name", "image", "image_id", "image_path")
_IMAGES = ("image", "img", "jpg", "png", "webp", "pixel_values")
_LABELS = ("label", "labels", "class", "cls", "category", "target", "fine_label")
SEPARATORS = {".csv": ",;\t|", ".tsv": "\t,;|", ".txt": "\t,;| "}
"""Separators of columns that a table of text may have, by its suffix. The most frequent is first."""


def is_table(url: str) -> bool:
    """Return whether a URL is a table by its suffix. A Parquet file is a table where it contains no images."""
    name, _, column = url.partition("#")
    if suffix(name) != ".parquet":
        return suffix(name) in SEPARATORS
    return bool(column) or not _binary(schema(name))


def read(url: str) -> Source:
    """Read images that the rows of a table name.

    A path is relative to the table's folder or to any other folder (see `_find`). A column that is named by `#COLUMN`
    and holds only −1, 0 and 1 is an attribute. It gives two classes: COLUMN and "not COLUMN".

    Raises UsageError where the table is missing or cannot be read, its columns are unclear, or an image is missing.
    Raises EnvironmentFault where storage fails.
    """
    url, _, wanted = url.partition("#")
    rows = _parquet_rows(url) if suffix(url) == ".parquet" else _text_rows(url)
    tree = Tree.open(url.rpartition("/")[0] or ".")
    find = _finder(tree)
    if suffix(url) == ".parquet" or _is_header(rows[0], wanted, find):
        header, rows = [str(name) for name in rows[0]], rows[1:]
    else:
        header = [f"column {i + 1}" for i in range(len(rows[0]))]
    if not rows:
        raise UsageError(f"{url} has no rows", "give a table with a row for each image")
    header = ["path"] * (len(rows[0]) - len(header)) + header  # CelebA's header does not name the path
    path_column = _path_column(header, rows[0], wanted, find)
    label_column = _label_column(url, header, path_column, wanted)
    labels = [row[label_column] for row in rows]
    if {str(label) for label in labels} <= {"-1", "0", "1"} and wanted:  # an attribute that an image has or lacks
        labels = [wanted if str(label) == "1" else f"not {wanted}" for label in labels]
    images, used = [], [files.name(url)]
    for row, label in zip(rows, labels, strict=True):
        name = str(row[path_column])
        if len(matches := find(name)) != 1:
            few = f"; the first are {', '.join(map(printable, matches[:3]))}" if matches else ""
            raise UsageError(
                f"{url} names {name!r}, but there are {len(matches)} images of this name below its folder{few}",
                "give paths relative to the table",
            )
        used.append(matches[0])
        images.append(Row(name, tree.places[matches[0]], label, "train"))
    source = source_of("table", images)
    reasons = dict.fromkeys(tree.images, "not named by the table")
    return replace(source, left_out=tally(tree.left_out(used, reasons)))


def has_images(url: str) -> bool:
    """Return whether a Parquet file has images: bytes in a column of a usual name, or Hugging Face's {bytes, path}.

    Other bytes may be anything, for example digests. Raises UsageError, EnvironmentFault.
    """
    import pyarrow as pa

    found = schema(url)
    return any(name in _IMAGES or pa.types.is_struct(found.field(name).type) for name in _binary(found))


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
    """Return the class names, by label, that Hugging Face stores in a Parquet file's schema; None without them.

    Raises ValueError, LookupError, TypeError or AttributeError where they are no list of texts.
    """
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features", {})
    names = next((features[name]["names"] for name in _LABELS if "names" in features.get(name, {})), None)
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError("the names of the classes are no list of texts")
    return names


def schema(url: str) -> Any:
    """Return the Arrow schema of a Parquet file. Raises UsageError where there is no file, EnvironmentFault."""
    with open_parquet(url) as table:
        return table.schema_arrow


@contextmanager
def open_parquet(url: str) -> Iterator[Any]:
    """Open a Parquet file as a `pyarrow.parquet.ParquetFile`.

    Raises UsageError where the file is missing, truncated or damaged, also where the body of the `with` statement finds
    this. Raises EnvironmentFault where storage fails.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with files.reading(url) as file:
            try:
                yield pq.ParquetFile(file)
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:  # of the storage or of a disk
                    raise
                require_no_pointer(url)
                raise UsageError(
                    f"{url} is no Parquet file, or it is truncated or damaged: {error}", "download it again"
                ) from error
    except FileNotFoundError:
        raise UsageError(f"{url} does not exist", "correct the path or URL") from None


def _binary(schema: Any) -> list[str]:
    """Return the names of the columns that hold bytes or {bytes, path}."""
    import pyarrow as pa

    def holds_bytes(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(inner.name == "bytes" for inner in kind)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    return [column.name for column in schema if holds_bytes(column.type)]


# --- text ------------------------------------------------------------------------------------------------------------


def _parquet_rows(url: str) -> list[list[Any]]:
    """Return the rows of a Parquet table, the names of its columns first."""
    with open_parquet(url) as table:
        content = table.read()
        return [content.column_names, *(list(row.values()) for row in content.to_pylist())]


def _text_rows(url: str) -> list[list[Any]]:
    """Return the rows of a table of text. All have the same number of columns; the first may have one less.

    Raises UsageError that names the encoding or the separator where one of them cannot be found out.
    """
    try:
        data = files.read_bytes(url)
    except FileNotFoundError:
        raise UsageError(f"{url} does not exist", "correct the path or URL") from None
    require_no_pointer(url)
    lines = re.split(r"\r\n|\n|\r", _decoded(url, data))
    if len(lines) > 1 and re.fullmatch(r"\s*\d+\s*", lines[0]):  # CelebA's tables begin with the number of rows
        lines = lines[1:]
    separators = SEPARATORS[suffix(url)]
    if lines and (named := re.fullmatch(r"sep=(.)", lines[0])):  # Excel writes this line
        separators, lines = named[1], lines[1:]
    found = [(separator, _split(lines, separator)) for separator in separators]
    for separator, rows in found:
        if rows and len(rows[-1]) > 1 and {len(row) for row in rows[1:]} <= {len(rows[-1])}:
            missing = len(rows[-1]) - len(rows[0])
            if missing == 0 or (missing == 1 and separator in "\t "):  # CelebA's header does not name the path
                return rows
    separator, rows = max(found, key=lambda pair: max(map(len, pair[1]), default=0))
    if not rows:
        raise UsageError(f"{url} has no rows", "give a table with a row for each image")
    bad = next((row for row in rows if len(row) != len(rows[0])), rows[0])
    raise UsageError(
        f"{url}: no separator of {' '.join(map(repr, separators))} cuts all rows into equally many columns. With "
        f"{separator!r}, the first row {rows[0]} has {len(rows[0])} columns, but row {bad} has {len(bad)} values",
        "correct the row, or write the table with commas and quotes around texts that contain commas",
    )


def _decoded(url: str, data: bytes) -> str:
    """Return the text of a table, UTF-8 or UTF-16. Raises UsageError where it has another encoding."""
    encoding = "utf-8-sig"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif b"\0" in data[:4]:
        encoding = "utf-16-be" if data[:1] == b"\0" else "utf-16-le"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        shown = data.splitlines()[line - 1].decode("cp1252", errors="replace") if encoding == "utf-8-sig" else ""
        guess = f"; in Windows-1252 the line is {shown!r}" if shown else ""
        raise UsageError(
            f"{url} is not UTF-8 or UTF-16 text: line {line} has byte 0x{data[error.start]:02x}{guess}",
            "save the table with the encoding UTF-8, for example: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW",
        ) from None


def _split(lines: list[str], separator: str) -> list[list[str]]:
    """Return the cells of all lines that are not empty."""
    if separator == " ":
        return [line.split() for line in lines if line.strip()]
    try:
        rows = list(csv.reader(lines, delimiter=separator, skipinitialspace=True))
    except csv.Error:
        return []
    return [[cell.strip() for cell in row] for row in rows if any(row)]


# --- columns and paths -----------------------------------------------------------------------------------------------


def _finder(tree: Tree) -> Callable[[str], list[str]]:
    """Return a function that maps a path of a table to the images of a tree.

    A path names an image where the one ends in the other, in whole folders: `C:\\set\\cat\\1.png` and `1.png` both name
    `cat/1.png`. The suffix may be missing. Of several images, those that agree in the most folders are found.
    """
    by_name: dict[str, list[str]] = {}
    for path in tree.images:
        name = path.rpartition("/")[2]
        by_name.setdefault(name, []).append(path)
        by_name.setdefault(splitext(name)[0], []).append(path)

    def find(text: str) -> list[str]:
        if text in tree.places:
            return [text]
        wanted = _parts(text)
        if not wanted:
            return []
        matches: dict[int, list[str]] = {}
        for path in dict.fromkeys(by_name.get(wanted[-1], [])):
            parts = _parts(path)
            common = min(len(parts), len(wanted)) - 1
            if common == 0 or parts[-common - 1 : -1] == wanted[-common - 1 : -1]:
                matches.setdefault(common, []).append(path)
        return matches[max(matches)] if matches else []

    return find


def _parts(path: str) -> list[str]:
    return [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]


def _is_header(row: list[str], wanted: str, find: Callable[[str], list[str]]) -> bool:
    """Return whether the first row of a table has names of columns: known names, or no value that names an image."""
    if any(cell.lower() in _PATHS for cell in row) and any(_has_labels(cell, wanted) for cell in row):
        return True
    return not any(find(cell) or suffix(cell) in IMAGES for cell in row)


def _has_labels(name: str, wanted: str) -> bool:
    """Return whether a column of this name has labels."""
    return name.lower() in _LABELS or (wanted != "" and name == wanted)


def _path_column(header: list[str], row: list[Any], wanted: str, find: Callable[[str], list[str]]) -> int:
    """Return the number of the column of paths: by its name, else by its values.

    A column of labels is none, although a label may be the name of an image: 0 and 0.png.
    """
    others = [i for i, name in enumerate(header) if not _has_labels(name, wanted)]
    named = [i for i in others if header[i].lower() in _PATHS]
    with_images = [i for i in others if find(str(row[i]))]
    return next((i for i in named if i in with_images), (with_images + named + others + [0])[0])


def _label_column(url: str, header: list[str], path_column: int, wanted: str) -> int:
    """Return the number of the column of labels. Raises UsageError where it is unclear."""
    if wanted and wanted in header:  # a column may have no name
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
