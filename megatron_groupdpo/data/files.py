"""Files to raw records: ``(record, "file:line")`` in a fixed order.

JSON Lines are read line by line here rather than through ``datasets``, so that an error can name the line and
memory stays bounded. Parquet, Arrow and named datasets go through ``datasets`` in streaming mode, which writes
no cache; their second number is the 1-based row.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

from megatron_groupdpo.errors import DataError

JSON_LINES = (".jsonl", ".ndjson")
JSON_FILES = (".json",)
COLUMNAR = {".parquet": "parquet", ".arrow": "arrow"}
COMPRESSED = (".gz", ".zst")
DATASET_PREFIX = "hf:"
"""``hf:owner/name`` or ``hf:owner/name:split`` names a dataset of the Hugging Face hub."""

RawRecord = dict[str, Any]


def expand_inputs(inputs: Sequence[str]) -> tuple[str, ...]:
    """Folders and globs expanded to files, sorted within each; ``hf:`` names pass through.

    Raises:
        DataError: a path does not exist, a glob or folder holds nothing readable, or a kind is unknown.
    """
    sources: list[str] = []
    for given in inputs:
        path = Path(given)
        if given.startswith(DATASET_PREFIX) or _is_saved_dataset(path):
            sources.append(given)
        elif path.is_dir():
            found = sorted(str(file) for file in path.rglob("*") if file.is_file() and kind_of(file) is not None)
            if not found:
                raise DataError(f"{given}: a folder must hold files of a known kind ({_kinds()}), found none")
            sources.extend(found)
        elif path.exists():
            sources.append(given)
        else:
            sources.extend(_glob(given))
    for source in sources:
        known = source.startswith(DATASET_PREFIX) or Path(source).is_dir() or kind_of(Path(source)) is not None
        if not known:
            raise DataError(f"{source}: unknown kind of file; known are {_kinds()}, also with .gz or .zst")
    return tuple(sources)


def read_records(source: str) -> Iterator[tuple[RawRecord, str]]:
    """The records of one source, as :func:`expand_inputs` names it.

    Raises:
        DataError: broken JSON, bad UTF-8, a record that is no object, a cut-short archive, no record at all.
    """
    if source.startswith(DATASET_PREFIX) or Path(source).is_dir():
        records = _read_dataset(source)
    elif kind_of(Path(source)) in COLUMNAR:
        records = _read_columnar(source)
    else:
        records = _read_json(source)
    empty = True
    for record, where in records:
        empty = False
        if not isinstance(record, dict):
            raise DataError(f"{where}: a record must be a JSON object, got {type(record).__name__}")
        yield record, where
    if empty:
        raise DataError(f"{source}: the file holds no record; remove it from --input or write it again")


def kind_of(path: Path) -> str | None:
    """The suffix that says how to read ``path`` (compression set aside); None where unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSED
    if compressed:
        suffixes.pop()
    known = (*JSON_LINES, *JSON_FILES) if compressed else (*JSON_LINES, *JSON_FILES, *COLUMNAR)
    return suffixes[-1] if suffixes and suffixes[-1] in known else None


def _kinds() -> str:
    return ", ".join((*JSON_LINES, *JSON_FILES, *COLUMNAR))


def _glob(pattern: str) -> list[str]:
    if not glob.has_magic(pattern):
        raise DataError(
            f"{pattern}: no such file or folder; for a Hugging Face dataset write {DATASET_PREFIX}OWNER/NAME"
        )
    found = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
    if not found:
        raise DataError(f"{pattern}: the pattern matches no file")
    return found


def _is_saved_dataset(path: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` wrote this folder."""
    return (path / "state.json").exists() and (path / "dataset_info.json").exists()


@contextmanager
def _open_bytes(source: str) -> Iterator[IO[bytes]]:
    try:
        if source.lower().endswith(".gz"):
            with gzip.open(source, "rb") as stream:
                yield stream  # type: ignore[misc]
        elif source.lower().endswith(".zst"):
            with zstandard.open(source, "rb") as stream:
                yield io.BufferedReader(stream)  # type: ignore[arg-type]
        else:
            with open(source, "rb") as stream:
                yield stream
    except (EOFError, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise DataError(f"{source}: the archive is cut short or damaged ({error}); copy it again") from None
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror or error})") from None


def _read_json(source: str) -> Iterator[tuple[Any, str]]:
    with _open_bytes(source) as stream:
        if kind_of(Path(source)) in JSON_FILES:
            content = _decode(stream.read(), source)
            if not content.strip():
                return
            if content.lstrip()[0] == "[":
                for row, record in enumerate(_loads(content, source), start=1):
                    yield record, f"{source}:{row}"
                return
            if _is_one_document(content):
                yield json.loads(content), f"{source}:1"
                return
            lines: Any = (line.encode() for line in content.splitlines(keepends=True))
        else:
            lines = stream
        for number, line in enumerate(lines, start=1):
            where = f"{source}:{number}"
            text = _decode(line, where)
            if text.strip():
                yield _loads(text, where), where


def _is_one_document(content: str) -> bool:
    try:
        json.loads(content)
    except (json.JSONDecodeError, RecursionError):
        return False
    return True


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: must be UTF-8, but {error}; convert the file") from None


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: broken JSON: {error.msg} at line {error.lineno} column {error.colno} of the text "
            f"{_excerpt(text, error.pos)}; repair or remove it"
        ) from None
    except RecursionError:
        raise DataError(f"{where}: broken JSON: nested too deeply") from None


def _excerpt(text: str, position: int) -> str:
    return repr(text[max(0, position - 20) : position + 20])


def _read_columnar(source: str) -> Iterator[tuple[Any, str]]:
    import datasets

    builder = COLUMNAR[kind_of(Path(source)) or ""]
    try:
        rows = datasets.load_dataset(builder, data_files=source, split="train", streaming=True)
        for row, record in enumerate(rows, start=1):
            yield record, f"{source}:{row}"
    except DataError:
        raise
    except Exception as error:
        # pyarrow and datasets raise many kinds for a damaged file
        raise DataError(f"{source}: cannot be read as {builder} ({error}); write it again") from None


def _read_dataset(source: str) -> Iterator[tuple[Any, str]]:
    import datasets

    try:
        if source.startswith(DATASET_PREFIX):
            name, _, split = source.removeprefix(DATASET_PREFIX).partition(":")
            rows: Any = datasets.load_dataset(name, split=split or "train", streaming=True)
        else:
            rows = datasets.load_from_disk(source)
    except Exception as error:
        raise DataError(
            f"{source}: cannot be loaded as a dataset ({error}); check the name, the split and the network"
        ) from None
    for row, record in enumerate(rows, start=1):
        yield record, f"{source}:{row}"


def count_records(source: str) -> int | None:
    """How many records a source has, for a progress bar; None where only reading it all would tell."""
    path = Path(source)
    if source.startswith(DATASET_PREFIX) or path.is_dir() or path.suffix.lower() in COMPRESSED:
        return None
    if kind_of(path) == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(source).metadata.num_rows
        except (OSError, pyarrow.ArrowException):
            return None  # reading it will say what is wrong
    if kind_of(path) not in JSON_LINES:
        return None
    with _open_bytes(source) as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))
