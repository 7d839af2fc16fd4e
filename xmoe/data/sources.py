"""Sources: where text comes from. A source is named by one string:

- `python`: source and documentation of the running Python's standard library, which is on every machine;
- a text file, or a folder of texts (read in the order of their names);
- a `.jsonl` file;
- `org/name`, a dataset on the hub, read through the `datasets` library;
- several of these joined by commas.

How the text is cut into documents is told in :mod:`xmoe.data.documents`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from xmoe.data.cache import cache_folder, digest, one_maker
from xmoe.data.documents import cut_file, cut_rows, utf8
from xmoe.errors import DataError
from xmoe.outputs import new_file

PYTHON = "python"
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".py")
ROW_SUFFIXES = (".jsonl", ".ndjson")

# Fields that hold the text of a row, tried in this order where no field is named; several are joined by a newline.
KNOWN_FIELDS = (
    ("text",),
    ("content",),
    ("page",),
    ("question", "answer"),
    ("problem", "solution"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "input", "output"),
)

# Parts of the standard library that are no prose and no code worth learning from: test data, installed packages,
# generated tables.
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "encodings", "__pycache__"}


@dataclass(frozen=True)
class Place:
    """Where one source's text is.

    Attributes:
        name: as the user gave it.
        files: local files in the order in which they are read; none for a dataset on the hub.
        ready: the files hold documents from the hub, cut already, one a row.
    """

    name: str
    files: tuple[Path, ...] = ()
    ready: bool = False

    @property
    def on_hub(self) -> bool:
        return not self.files

    def content_hash(self) -> str:
        """Stands for the text of these files and the way they are read; a renamed file is still the same text."""
        hashes = []
        for file in self.files:
            with open(file, "rb") as f:
                state = hashlib.blake2b(digest_size=16)
                while block := f.read(1 << 20):
                    state.update(block)
            hashes.append((file.suffix in ROW_SUFFIXES, state.hexdigest()))
        return digest(self.name == PYTHON, self.ready, hashes)

    def size(self) -> int:
        """Bytes of the local files."""
        return sum(file.stat().st_size for file in self.files)


@dataclass(frozen=True)
class Reading:
    """How a source is read.

    Attributes:
        subset, split: of a hub dataset.
        text_field: field of a row that holds the text; `question+answer` joins two by a newline. None tries the
            usual names (:data:`KNOWN_FIELDS`).
        separator: see :mod:`xmoe.data.documents`.
        max_bytes: stop behind the document that reaches so many bytes of UTF-8.
    """

    subset: str | None = None
    split: str = "train"
    text_field: str | None = None
    separator: str = "auto"
    max_bytes: int | None = None


def locate(source: str | Path) -> list[Place]:
    """The places that `source` names, in its order.

    Raises:
        DataError: a file or folder that is not there, or a folder without texts.
    """
    source = str(source).strip()
    if "," in source and not Path(source).exists():
        return [place for part in source.split(",") if part.strip() for place in locate(part)]
    if source == PYTHON:
        return [Place(source, _standard_library())]
    path = Path(source).expanduser()
    if path.is_file():
        return [Place(source, (path,))]
    if path.is_dir():
        wanted = TEXT_SUFFIXES + ROW_SUFFIXES
        files = sorted(p for p in path.rglob("*") if p.suffix in wanted and p.is_file() and not _is_hidden(p, path))
        if not files:
            raise DataError(f"folder {source} holds no texts; looked for files ending in {' '.join(wanted)}")
        return [Place(source, tuple(files))]
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith(".")
    if is_hub_name and path.suffix not in TEXT_SUFFIXES + ROW_SUFFIXES and not path.parent.is_dir():
        return [Place(source)]
    raise DataError(
        f"no file or folder {source!r}; expected a text file, a folder, a .jsonl file, python, or a hub org/name"
    )


def load_documents(source: str | Path | list[Place], reading: Reading | None = None) -> Iterator[str]:
    """The documents of `source`, one after the other, none of them blank; nothing is read before it is asked for.

    Raises:
        DataError: at once for a source that is not there; on the way for text that is not UTF-8, JSON that is malformed,
            a field that is missing (each with file and line), a hub that cannot be reached, no text at all.
    """
    reading = reading or Reading()
    places = source if isinstance(source, list) else locate(source)
    documents = itertools.chain.from_iterable(_documents(place, reading) for place in places)
    return _bounded(documents, reading.max_bytes, ", ".join(place.name for place in places))


def load_rows(source: str | Path | list[Place], reading: Reading | None = None) -> Iterator[tuple[str, dict]]:
    """(where, fields) of each row of the .jsonl files and hub datasets of `source`; files of text have no rows.

    Raises:
        DataError: as :func:`load_documents`.
    """
    reading = reading or Reading()
    for place in source if isinstance(source, list) else locate(source):
        if place.on_hub:
            found: Iterable[_Row] = _hub_rows(place.name, reading.subset, reading.split)
        else:
            found = itertools.chain.from_iterable(_jsonl_rows(f) for f in place.files if f.suffix in ROW_SUFFIXES)
        for row in found:
            yield row.where, row.fields


def keep_hub_documents(place: Place, reading: Reading) -> Place:
    """The same documents as a local file in the user's cache, fetched once: a second run needs no network."""
    name = digest(place.name, dataclasses.astuple(reading))
    path = cache_folder("texts") / f"{name}.jsonl"
    with one_maker(path):
        if not path.is_file():
            with new_file(path, overwrite=True) as partial, open(partial, "w", encoding="utf-8") as f:
                for document in tqdm(
                    load_documents([place], reading), desc=place.name, unit=" documents", disable=None
                ):
                    f.write(json.dumps({"text": document}) + "\n")
    return Place(place.name, (path,), ready=True)


def _documents(place: Place, reading: Reading) -> Iterator[str]:
    fields = tuple(reading.text_field.split("+")) if reading.text_field else None
    if place.ready:
        fields, reading = ("text",), dataclasses.replace(reading, separator="file")
    if place.on_hub:
        rows = _hub_rows(place.name, reading.subset, reading.split)
        yield from cut_rows((_row_text(row, fields) for row in rows), reading.separator)
    for file in place.files:
        if file.suffix in ROW_SUFFIXES:
            yield from cut_rows((_row_text(row, fields) for row in _jsonl_rows(file)), reading.separator)
        elif place.name == PYTHON:
            yield from _library_file(file, reading.separator)
        else:
            size = file.stat().st_size
            yield from cut_file(_lines(file), reading.separator, size=size, alone=len(place.files) == 1)


def _bounded(documents: Iterable[str], max_bytes: int | None, source: str) -> Iterator[str]:
    size = 0
    for document in documents:
        if not document.strip():
            continue
        yield document
        size += len(utf8(document))
        if max_bytes is not None and size >= max_bytes:
            return
    if not size:
        raise DataError(f"{source} holds no text")


# --- text files -----------------------------------------------------------------------------------------------------


def _lines(file: Path) -> Iterator[str]:
    """Lines with their own line ends; a byte order mark is dropped."""
    number = 0
    with open(file, encoding="utf-8-sig", newline="") as f:
        try:
            for line in f:
                number += 1
                yield line
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise DataError(
                f"{file} is not UTF-8 text (byte 0x{byte:02x} after line {number}); convert it, for example with iconv"
            ) from error


def _standard_library() -> tuple[Path, ...]:
    """Source and documentation files, in the order of a hash of their names, so that the first part is a fair sample."""
    root = Path(sysconfig.get_path("stdlib"))
    files = {}
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _NOT_LIBRARY and not name.startswith("config-")]
        for name in names:
            if name.endswith((".py", ".txt", ".rst")) and not name.startswith("_sysconfigdata"):
                file = Path(folder, name)
                files[file.relative_to(root).as_posix()] = file
    if not files:
        raise DataError(f"no source text in this Python's library folder {root}; name a text file or a folder instead")
    return tuple(files[name] for name in sorted(files, key=lambda n: hashlib.blake2b(n.encode()).digest()))


def _library_file(file: Path, separator: str) -> Iterator[str]:
    """A module in another encoding than UTF-8 (there are hardly any) is passed over: it is not the user's to mend."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    yield from cut_file(text.splitlines(keepends=True), separator, size=len(text), alone=False)


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


# --- rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    fields: dict
    where: str  # "data.jsonl:3"


def _jsonl_rows(file: Path) -> Iterator[_Row]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: malformed JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(fields, dict):
            raise DataError(f'{where}: expected an object such as {{"text": ...}}, found {line.strip()[:40]}')
        yield _Row(fields, where)


def _row_text(row: _Row, fields: tuple[str, ...] | None) -> str:
    names = fields or next((known for known in KNOWN_FIELDS if all(f in row.fields for f in known)), None)
    here = ", ".join(map(str, row.fields)) or "none"
    if names is None:
        raise DataError(f"{row.where}: no field that is known to hold text (fields: {here}); set data.text_field")
    missing = [name for name in names if name not in row.fields]
    if missing:
        raise DataError(f"{row.where}: no field {missing[0]!r} (fields: {here}); set data.text_field")
    values = [row.fields[name] for name in names]
    for name, value in zip(names, values):
        if not isinstance(value, str):
            raise DataError(f"{row.where}: field {name!r} is not text but {type(value).__name__}; set data.text_field")
    return "\n".join(value for value in values if value)


def _hub_rows(name: str, subset: str | None, split: str) -> Iterator[_Row]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"reading {name} from the hub needs the datasets library: pip install 'xmoe[hub]'") from None
    number = 0
    try:
        if subset is None:  # many a dataset has parts, and the whole one is called main or default
            parts = datasets.get_dataset_config_names(name)
            subset = next(
                (part for part in ("default", "main") if part in parts), parts[0] if len(parts) == 1 else None
            )
            if subset is None:
                raise DataError(
                    f"the hub dataset {name} has several parts; set data.subset to one of {', '.join(parts)}"
                )
        for number, fields in enumerate(datasets.load_dataset(name, subset, split=split, streaming=True), 1):
            yield _Row(fields, f"{name}:{number}")
    except (DataError, GeneratorExit):
        raise
    except Exception as error:  # the library passes on whatever its network and file layers raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            f"cannot read the hub dataset {name} ({reason}); without a network use a local .txt or .jsonl file or a folder"
        ) from error
