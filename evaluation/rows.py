"""Where benchmark rows come from: files under `--data-dir`, or the `datasets` library; and how a bad row is reported.

Local files are read directly, so neither a network nor the `datasets` library is needed for them. Nothing here invents
rows: a benchmark without data stops with the path or the command that would help.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xmoe.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".raw")
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val"),
    "test": ("test",),
    "dev": ("dev", "development"),
}


@dataclass(frozen=True)
class Row:
    """One row as it was read. `where` says it to a person (`data/hellaswag/val.jsonl:17`); `part` is what the file's
    name adds to the row (for MMLU's files the subject)."""

    fields: dict[str, Any]
    where: str
    part: str = ""

    def text(self, name: str) -> str:
        """A field that must be a string."""
        return self._typed(name, str, "a string")

    def texts(self, name: str, count: int | None = None) -> list[str]:
        """A field that must be a list of strings, of `count` entries where that is given."""
        value = self._field(name)
        value = value.tolist() if hasattr(value, "tolist") else value
        right = isinstance(value, list) and value and all(isinstance(v, str) for v in value)
        if not right or (count is not None and len(value) != count):
            wanted = f"a list of {count} strings" if count else "a list of strings"
            raise self.error(f"field {name!r} is {_short(value)}; expected {wanted}")
        return value

    def mapping(self, name: str) -> Row:
        """A field that must be an object, as a row of its own."""
        return Row(self._typed(name, dict, "an object"), self.where, self.part)

    def number_in(self, name: str, count: int) -> int:
        """A field that must be an integer in [0, count), also when written as a string."""
        value = self._field(name)
        try:
            number = int(value)
        except (TypeError, ValueError):
            number = -1
        if not 0 <= number < count:
            raise self.error(f"field {name!r} is {_short(value)}; expected a number from 0 to {count - 1}")
        return number

    def error(self, message: str) -> DataError:
        """A DataError that begins with this row's file and line."""
        return DataError(f"{self.where}: {message}")

    def _field(self, name: str) -> Any:
        if name not in self.fields:
            found = ", ".join(map(str, self.fields)) or "none"
            raise self.error(f"no field {name!r}; the row has {found}")
        return self.fields[name]

    def _typed(self, name: str, kind: type, wanted: str) -> Any:
        value = self._field(name)
        if not isinstance(value, kind):
            raise self.error(f"field {name!r} is {_short(value)}; expected {wanted}")
        return value


@dataclass(frozen=True)
class Source:
    """Where the rows of one split came from, for the report."""

    path: str
    sha256: str
    rows: int

    def as_dict(self) -> dict[str, Any]:
        return {"path": self.path, "sha256": self.sha256, "rows": self.rows}


@dataclass(frozen=True)
class Location:
    """Where one benchmark's rows may be found.

    folders: names under the data folder, the preferred one first. must_contain: a word the file's name must hold, where
    several benchmarks share a folder. hub: (repository, configuration) for `datasets`. splits: the role of rows ->
    names of splits that serve it, best first.
    """

    folders: tuple[str, ...]
    hub: tuple[str, str | None]
    splits: dict[str, tuple[str, ...]]
    must_contain: str = ""
    part_from_name: bool = False
    csv_fields: tuple[str, ...] = field(default=())


def load_rows(benchmark: str, location: Location, role: str, data_dir: str | Path | None) -> tuple[list[Row], Source]:
    """The rows of `role` ("eval" or "fewshot") in file order, and where they came from.

    Raises:
        DataError: no data (the message names the path or command that helps), or a malformed row (file and line).
    """
    if data_dir is None:
        return _from_hub(benchmark, location, role)
    root = Path(data_dir)
    if not root.is_dir():
        raise DataError(f"--data-dir {root} is not a folder; expected one that holds {location.folders[0]}/")
    files = _find_files(benchmark, location, role, root)
    rows = [row for file in files for row in read_file(file, location)]
    if not rows:
        raise DataError(f"{files[0]}: no rows for {benchmark}; expected at least one")
    shown = files[0] if len(files) == 1 else files[0].parent
    return rows, Source(str(shown), _sha256(files), len(rows))


def read_file(file: Path, location: Location) -> Iterator[Row]:
    """Rows of one JSONL, JSON, CSV, Parquet or text file (a text file is one row with the field `text`)."""
    part = _part(file) if location.part_from_name else ""
    if file.suffix == ".jsonl":
        with open(file, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield Row(_parse_line(line, f"{file}:{number}"), f"{file}:{number}", part)
    elif file.suffix == ".json":
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise DataError(f"{file}:{error.lineno}: not JSON ({error.msg})") from error
        if not isinstance(content, list) or not all(isinstance(r, dict) for r in content):
            raise DataError(f"{file}: expected a list of objects (or one object a line in a .jsonl file)")
        for number, fields in enumerate(content, 1):
            yield Row(fields, f"{file}: row {number}", part)
    elif file.suffix == ".csv":
        yield from _read_csv(file, part, location.csv_fields)
    elif file.suffix == ".parquet":
        for number, fields in enumerate(_read_parquet(file), 1):
            yield Row(fields, f"{file}: row {number}", part)
    else:
        yield Row({"text": file.read_text(encoding="utf-8")}, str(file), part)


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(fields, dict):
        raise DataError(f"{where}: {_short(fields)} is no row; expected a JSON object")
    return fields


def _read_csv(file: Path, part: str, headerless: tuple[str, ...]) -> Iterator[Row]:
    """A CSV without a header has exactly the columns `headerless`; otherwise the first line names them."""
    with open(file, newline="", encoding="utf-8") as f:
        reader = csv.reader(f)
        names = list(headerless)
        start = 1
        for values in reader:
            where = f"{file}:{start}"  # a quoted field may hold newlines: report the line on which the row begins
            start = reader.line_num + 1
            if not values:
                continue
            if not names or (where.endswith(":1") and names[0] in (v.strip().lower() for v in values)):
                names = [v.strip() for v in values]
                continue
            if len(values) != len(names):
                raise DataError(f"{where}: {len(values)} columns; expected {len(names)}: {', '.join(names)}")
            yield Row(dict(zip(names, values)), where, part)


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{file}: reading Parquet needs pyarrow; pip install pyarrow, or give JSONL") from error
    try:
        return pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file}: not a Parquet file ({str(error).splitlines()[0]})") from error


def _find_files(benchmark: str, location: Location, role: str, root: Path) -> list[Path]:
    folder = next((root / name for name in location.folders if (root / name).is_dir()), None)
    if folder is None:
        raise DataError(f"no data for {benchmark}: expected the folder {root / location.folders[0]}")
    every = sorted(
        p
        for p in folder.rglob("*")
        if p.is_file()
        and p.suffix in SUFFIXES
        and not p.name.upper().startswith("README")
        and location.must_contain in str(p.relative_to(root)).lower()
    )
    for split in location.splits[role]:
        files = [p for p in every if _split_of(p.relative_to(folder)) == split]
        if files:
            return _one_format(benchmark, files)
    undivided = [p for p in every if _split_of(p.relative_to(folder)) is None]
    if role == "eval" and undivided:  # a file whose name says nothing of splits can only be what is to be scored
        return _one_format(benchmark, undivided)
    wanted = location.splits[role][0]
    of = f" with {location.must_contain!r} in its name" if location.must_contain else ""
    raise DataError(
        f"no {wanted} rows for {benchmark} in {folder}: expected a .jsonl, .csv or .parquet file{of}, "
        f"such as {folder / (wanted + '.jsonl')}"
    )


def _one_format(benchmark: str, files: list[Path]) -> list[Path]:
    kinds = sorted({p.suffix for p in files})
    if len(kinds) > 1:
        listed = ", ".join(str(p) for p in files[:4])
        raise DataError(f"{benchmark}: the same rows in {' and '.join(kinds)}? found {listed}; leave one of them there")
    return files


def _split_of(relative: Path) -> str | None:
    """The split that a path speaks of; the file's own name counts before its folders."""
    for part in (relative.name, *reversed(relative.parent.parts)):
        words = set(re.split(r"[^a-z]+", part.lower()))
        for split, names in SPLIT_WORDS.items():
            if words & set(names):
                return split
    return None


def _part(file: Path) -> str:
    """`anatomy_test.csv` -> anatomy; `anatomy/test-00000-of-00001.parquet` -> anatomy; `test.jsonl` -> nothing."""
    everything = {name for names in SPLIT_WORDS.values() for name in names}
    words = re.split(r"[_-]", re.sub(r"[-_]\d{5}-of-\d{5}$", "", file.stem))
    left = "_".join(w for w in words if w.lower() not in everything)
    if left:
        return left
    parent = file.parent.name
    return "" if parent.lower() in everything | {"all", "auxiliary_train", "mmlu", "data"} else parent


def _from_hub(benchmark: str, location: Location, role: str) -> tuple[list[Row], Source]:
    repository, configuration = location.hub
    split = location.splits[role][0]
    help_ = f"or put the file at DIR/{location.folders[0]}/{split}.jsonl and pass --data-dir DIR"
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"no data for {benchmark}: without --data-dir it comes from {repository}, which needs `pip install datasets`; "
            + help_
        ) from error
    try:
        table = datasets.load_dataset(repository, configuration, split=split)
    except Exception as error:  # the library raises whatever its network layer does
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise DataError(
            f"no data for {benchmark}: {repository} ({split}) could not be fetched ({first}); connect to the network, {help_}"
        ) from error
    rows = [Row(dict(fields), f"{repository} {split} row {i}") for i, fields in enumerate(table)]
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.fields, sort_keys=True, default=str).encode())
    shown = f"{repository}{'/' + configuration if configuration else ''}:{split}"
    return rows, Source(shown, digest.hexdigest(), len(rows))


def _sha256(files: list[Path]) -> str:
    """Of the file's bytes; of several files, of their names and hashes in order."""
    hashes = [hashlib.sha256(p.read_bytes()).hexdigest() for p in files]
    if len(files) == 1:
        return hashes[0]
    return hashlib.sha256("\n".join(f"{p.name} {h}" for p, h in zip(files, hashes)).encode()).hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
