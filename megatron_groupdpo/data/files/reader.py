"""Files to raw records in a fixed order, each with its line or row.

JSON is read record by record here rather than through ``datasets``, so that an error can name the line, memory
stays bounded, and parsing can be left to worker processes. Parquet and Arrow are read in small batches of rows; named
datasets go through ``datasets`` in streaming mode, which writes no cache. Their number is the 1-based row.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

from megatron_groupdpo.data.files import json_array
from megatron_groupdpo.data.files.zstd_stream import ZstdStream
from megatron_groupdpo.errors import DataError, StopError

JSON_LINES = (".jsonl", ".ndjson")
JSON_FILES = (".json",)
COLUMNAR = {".parquet": "parquet", ".arrow": "arrow"}
COMPRESSED = (".gz", ".zst")
DATASET_PREFIX = "hf:"
"""``hf:owner/name`` or ``hf:owner/name:split`` names a dataset of the Hugging Face hub."""

RawRecord = dict[str, Any]
Raw = bytes | RawRecord
"""A record as it is read: JSON text, parsed later and elsewhere, or the row of a table."""

_LONGEST_FIRST_LINE = 1 << 20
_BATCH_ROWS = 64


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
            _refuse_dataset_dict(path)
            found = sorted(str(file) for file in path.rglob("*") if _holds_records(file, path))
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
    _refuse_repeats(sources)
    return tuple(sources)


_METADATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
"""What ``datasets`` writes beside the records."""


def _holds_records(file: Path, folder: Path) -> bool:
    """Whether a file of a folder is one to read: hidden files and metadata are not."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.is_file() and not hidden and file.name not in _METADATA and kind_of(file) is not None


def _refuse_dataset_dict(folder: Path) -> None:
    if (folder / "dataset_dict.json").exists():
        splits = sorted(str(path) for path in folder.iterdir() if _is_saved_dataset(path))
        raise DataError(f"{folder}: holds several splits of a dataset; name those to read: {', '.join(splits)}")


def _refuse_repeats(sources: Sequence[str]) -> None:
    seen: set[str] = set()
    for source in sources:
        name = source if source.startswith(DATASET_PREFIX) else os.path.realpath(source)
        if name in seen:
            raise DataError(f"{source}: given twice, its groups would count twice; name it once")
        seen.add(name)


def read_raw(source: str) -> Iterator[tuple[Raw, int]]:
    """The records of one source, as :func:`expand_inputs` names it, before their JSON is parsed; and line or row.

    At most one record of a JSON file is in memory at a time; of a columnar file, one batch of rows.

    Raises:
        DataError: a cut-short archive, a JSON array that is broken between its records, no record at all.
    """
    if source.startswith(DATASET_PREFIX) or Path(source).is_dir():
        records = _read_dataset(source)
    elif kind_of(Path(source)) in COLUMNAR:
        records = _read_columnar(source)
    else:
        records = _read_json(source)
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise DataError(f"{source}: the file holds no record; remove it from --input or write it again")


def parse_raw(raw: Raw, where: str) -> RawRecord:
    """The record of a line or row.

    Raises:
        DataError: broken JSON, bad UTF-8, or a record that is no object.
    """
    record = _loads(_decode(raw, where), where) if isinstance(raw, bytes) else raw
    if not isinstance(record, dict):
        raise DataError(f"{where}: a record must be a JSON object, got {type(record).__name__}")
    return record


def read_records(source: str) -> Iterator[tuple[RawRecord, str]]:
    """The parsed records of one source, each with its ``file:line``.

    Raises:
        DataError: as :func:`read_raw` and :func:`parse_raw`.
    """
    for raw, row in read_raw(source):
        where = f"{source}:{row}"
        yield parse_raw(raw, where), where


def approximate_size(raw: Any) -> int:
    """Characters of a record, to bound what is in memory at once."""
    if isinstance(raw, str | bytes):
        return len(raw)
    if isinstance(raw, Mapping):
        return sum(map(approximate_size, raw.values()))
    if isinstance(raw, list | tuple):
        return sum(map(approximate_size, raw))
    return 8


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
            with open(source, "rb") as file:
                yield io.BufferedReader(ZstdStream(file))
        else:
            with open(source, "rb") as stream:
                yield stream
    except gzip.BadGzipFile as error:
        raise DataError(f"{source}: no gzip file, or a damaged one ({error}); rename it, or copy it again") from None
    except (EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{source}: the archive is cut short or damaged ({error}); copy it again") from None
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror or error})") from None


def _read_json(source: str) -> Iterator[tuple[Raw, int]]:
    with _open_bytes(source) as stream:
        if kind_of(Path(source)) in JSON_LINES:
            yield from _lines(stream)
            return
        first = _first_line(stream)
        if first.lstrip()[:1] == b"[":
            yield from json_array.records(first, stream, source)
        elif not first.strip() or _is_json(first):
            yield from _lines(itertools.chain(io.BytesIO(first), stream))
        else:
            yield first + stream.read(), 1  # one object over several lines


def _lines(lines: Iterable[bytes]) -> Iterator[tuple[Raw, int]]:
    for number, line in enumerate(lines, start=1):
        if line.removeprefix(codecs.BOM_UTF8).strip():
            yield line, number


def _first_line(stream: IO[bytes]) -> bytes:
    """Everything up to the end of the first line that is not blank; of a very long line, its beginning."""
    read = b""
    while not read.removeprefix(codecs.BOM_UTF8).strip():
        line = stream.readline(_LONGEST_FIRST_LINE)
        if not line:
            break
        read = read.removeprefix(codecs.BOM_UTF8) + line
    read = read.removeprefix(codecs.BOM_UTF8)
    return read if read.lstrip()[:1] == b"[" or read.endswith(b"\n") else read + stream.readline()


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
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
        raise StopError(
            f"{where}: broken JSON: {error.msg} at line {error.lineno} column {error.colno} of the text "
            f"{_excerpt(text, error.pos)}; repair or remove it"
        ) from None
    except RecursionError:
        raise StopError(f"{where}: broken JSON: nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise StopError(f"{where}: JSON that cannot be read: {error}; repair or remove it") from None


def _excerpt(text: str, position: int) -> str:
    return repr(text[max(0, position - 20) : position + 20])


def _read_columnar(source: str) -> Iterator[tuple[Raw, int]]:
    kind = COLUMNAR[kind_of(Path(source)) or ""]
    try:
        yield from _numbered(_parquet_rows(source) if kind == "parquet" else _arrow_rows(source))
    except Exception as error:
        # pyarrow and datasets raise many kinds for a damaged file
        raise DataError(f"{source}: cannot be read as {kind} ({error}); write it again") from None


def _parquet_rows(source: str) -> Iterator[RawRecord]:
    import pyarrow.parquet

    # datasets would hold whole row groups; unbuffered, a page of each column is enough
    with pyarrow.parquet.ParquetFile(source, pre_buffer=False, buffer_size=1 << 16) as file:
        yield from _rows(file.schema_arrow, file.iter_batches(_BATCH_ROWS, use_threads=False))


def _arrow_rows(source: str) -> Iterator[RawRecord]:
    """Both of Arrow's layouts; ``datasets`` writes streams."""
    import pyarrow

    with pyarrow.OSFile(source) as stream:
        try:
            file = pyarrow.ipc.open_file(stream)
        except pyarrow.ArrowInvalid:
            stream.seek(0)
            reader = pyarrow.ipc.open_stream(stream)
            yield from _rows(reader.schema, reader)
            return
        yield from _rows(file.schema, (file.get_batch(i) for i in range(file.num_record_batches)))


def _rows(schema: Any, batches: Iterable[Any]) -> Iterator[RawRecord]:
    import datasets

    features = datasets.Features.from_arrow_schema(schema)
    is_coded = any(datasets.features.features.require_decoding(feature) for feature in features.values())
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                yield features.decode_example(row) if is_coded else row


def _read_dataset(source: str) -> Iterator[tuple[Raw, int]]:
    import datasets

    try:
        if source.startswith(DATASET_PREFIX):
            name, _, split = source.removeprefix(DATASET_PREFIX).partition(":")
            rows: Any = datasets.load_dataset(name, split=split or "train", streaming=True)
        else:
            rows = datasets.load_from_disk(source)
        yield from _numbered(rows)
    except Exception as error:
        raise DataError(
            f"{source}: cannot be loaded as a dataset ({error}); check the name, the split and the network"
        ) from None


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[Raw, int]]:
    return ((record, row) for row, record in enumerate(rows, start=1))


def identify(source: str) -> list[Any] | None:
    """What changes when a source does: path, size and time of its files. None for ``hf:`` names."""
    if source.startswith(DATASET_PREFIX):
        return None
    path = Path(source)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    try:
        return [[str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror or error})") from None


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
