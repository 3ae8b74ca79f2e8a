"""Files in, token store out: read, prepare (in worker processes where asked), write.

The order of the groups is the order of the input, whatever the number of workers. A journal in the work folder says
every few seconds how far the store is complete; after a kill the same command goes on from there.
"""

from __future__ import annotations

import datetime
import itertools
import json
import multiprocessing
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import megatron_groupdpo
from megatron_groupdpo.data import counts as why
from megatron_groupdpo.data.counts import Counts, counts_as_json, counts_from_json, summary_table
from megatron_groupdpo.data.files.reader import Raw, approximate_size, expand_inputs, identify, parse_raw, read_raw
from megatron_groupdpo.data.preprocess.prepare import (
    Chunk,
    GroupPreparer,
    Prepared,
    PreprocessOptions,
    prepare_chunk,
    start_worker,
    work,
)
from megatron_groupdpo.data.preprocess.work_folder import Journal, begun_at, start_afresh, whole_folder
from megatron_groupdpo.data.schemas import Schema, choose_schema
from megatron_groupdpo.data.store import format as fmt
from megatron_groupdpo.data.store.writer import StoreIdentity, StoreWriter, Written
from megatron_groupdpo.data.text.identity import describe
from megatron_groupdpo.data.text.loading import load_tokenizer
from megatron_groupdpo.data.text.tokenize import RENDERING, asks_for_date
from megatron_groupdpo.data.text.tokenizer import Tokenizer
from megatron_groupdpo.errors import ConfigError, DataError, UserError

NUM_DETECTION_RECORDS = 16
_CHUNK_RECORDS, _CHUNK_CHARACTERS = 64, 1 << 20  # what a worker takes at once, whichever is reached first
_COMMIT_SECONDS = 5.0  # a kill costs at most about this much work


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessReport:
    """What came of it."""

    counts: Counts
    schemas: tuple[tuple[str, str], ...]
    """(source, schema name)."""
    digest: str
    """The store's."""
    records_resumed: int = 0
    """Records that an earlier, killed run had done."""


@dataclass(slots=True, kw_only=True)
class _Progress:
    """How far the store is complete: every record of the sources before ``source``, and ``records`` of that one."""

    source: int = 0
    records: int = 0
    check: int = 0
    """CRC-32 of those records, where the source has no identity of its own."""
    counts: Counts = field(default_factory=Counts)
    schemas: list[str] = field(default_factory=list)
    written: Written | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Listeners:
    """Who hears of what happens."""

    on_schema: Callable[[str, Schema], None] = lambda source, schema: None
    """The schema of each source."""
    on_progress: Callable[[int], object] = lambda num_records: None
    """Records done since the last call."""
    on_note: Callable[[str], object] = lambda note: None
    """One line about an earlier run."""


def preprocess(
    inputs: Iterable[str],
    output: Path,
    options: PreprocessOptions,
    *,
    overwrite: bool = False,
    workers: int = 1,
    listeners: Listeners | None = None,
    commit_seconds: float = _COMMIT_SECONDS,
) -> PreprocessReport:
    """Build a token store at ``output``; it appears there whole or not at all.

    Where an earlier run with the same inputs, options and program was killed, its work is used; the store is the same.

    Raises:
        DataError: bad input, an existing ``output`` without ``overwrite``, a failing disk, or nothing left to write.
        ConfigError: contradicting options.
        UserError: a worker process died.
    """
    if workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {workers}")
    listeners = listeners or Listeners()
    sources = expand_inputs(list(inputs))
    tokenizer = load_tokenizer(options.tokenizer)
    options = _with_date(options, tokenizer, output)
    preparer = GroupPreparer(options, tokenizer)
    identity = _identity(options, tokenizer)
    with whole_folder(output, overwrite=overwrite) as folder:
        run = _Run(folder, identity, sources, listeners, commit_seconds, overwrite=overwrite)
        records_resumed = run.progress.counts[why.GROUPS_READ]
        with closing(run), _preparing(preparer, options, workers) as prepare_chunks:
            for source_id in range(run.progress.source, len(sources)):
                run.add_source(source_id, options, prepare_chunks)
            digest = run.finish()
    progress = run.progress
    return PreprocessReport(
        counts=progress.counts,
        schemas=tuple(zip(sources, progress.schemas)),
        digest=digest,
        records_resumed=records_resumed,
    )


class _Run:
    """One attempt: what is written so far, and the journal of it."""

    def __init__(
        self,
        folder: Path,
        identity: StoreIdentity,
        sources: tuple[str, ...],
        listeners: Listeners,
        seconds: float,
        *,
        overwrite: bool,
    ) -> None:
        self._sources, self._listeners, self._commit_seconds = sources, listeners, seconds
        self._journal = Journal(folder)
        self._identity = {
            "program": [megatron_groupdpo.__version__, fmt.VERSION],
            "libraries": [version(name) for name in ("tokenizers", "sentencepiece", "transformers")],
            "sources": [[source, identify(source)] for source in sources],
            "tokenizer": identity.tokenizer["digest"],
            "options": identity.options,
        }
        self.progress = _Progress()
        self._writer = self._go_on(folder, identity, overwrite) or self._start(folder, identity)
        self._committed = time.monotonic()

    def _go_on(self, folder: Path, identity: StoreIdentity, overwrite: bool) -> StoreWriter | None:
        """A writer where an earlier run ended, or None where it is of no use.

        Raises:
            UserError: it rendered records in another way than this program.
        """
        found = self._journal.read()
        if found is None:
            return None
        rendering = found[0].get("options", {}).get("rendering", 1)
        if rendering != RENDERING and not overwrite:
            raise UserError(
                f"{folder.parent}: half a store with rendering version {rendering}, and this program has {RENDERING}: "
                "the same records become other tokens; finish it with the program that began it, or begin anew with "
                "--overwrite"
            )
        changed = [key for key, value in self._identity.items() if found[0].get(key) != json.loads(json.dumps(value))]
        if changed:
            self._listeners.on_note(
                f"an earlier run was interrupted, but since then {' and '.join(changed)} changed: starting afresh"
            )
            return None
        try:
            progress = _progress_from_json(found[1])
            writer = StoreWriter(folder, identity, progress.written)
        except (ValueError, KeyError, TypeError) as error:
            self._listeners.on_note(f"what an interrupted run left cannot be used ({error}): starting afresh")
            return None
        self.progress = progress
        done = progress.counts[why.GROUPS_READ]
        self._listeners.on_note(f"an earlier run was interrupted: going on after {done:,} records")
        self._listeners.on_progress(done)
        return writer

    def _start(self, folder: Path, identity: StoreIdentity) -> StoreWriter:
        start_afresh(folder)
        return StoreWriter(folder, identity)

    def add_source(self, source_id: int, options: PreprocessOptions, prepare_chunks: PrepareChunks) -> None:
        """Everything of one source that is not done yet."""
        source, progress = self._sources[source_id], self.progress
        raws = read_raw(source)
        first = list(itertools.islice(raws, NUM_DETECTION_RECORDS))
        wheres = [f"{source}:{row}" for _, row in first]
        schema = choose_schema(options.schema, _detection_records(options.schema, first, wheres))
        schema.check(options.schema_options, source)
        self._listeners.on_schema(source, schema)
        progress.schemas[source_id:] = [schema.name]
        raws = itertools.chain(first, raws)
        done, check = progress.records, 0
        has_identity = identify(source) is not None
        for raw, _ in itertools.islice(raws, done):
            check = check if has_identity else _check(raw, check)
        if done and check != progress.check:
            raise DataError(
                f"{source}: the dataset changed since the interrupted run, which is now discarded; run it again"
            )

        def marked_chunks() -> Iterator[tuple[Chunk, int]]:
            nonlocal check
            for chunk in _chunks(raws, source, schema.name):
                if not has_identity:
                    for raw in chunk.raws:
                        check = _check(raw, check)
                yield chunk, check

        for (block, counts), num_records, progress.check in prepare_chunks(marked_chunks()):
            if block is not None:
                self._writer.add_block(block, source_id)
            progress.counts.update(counts)
            progress.records += num_records
            self._listeners.on_progress(num_records)
            if time.monotonic() - self._committed >= self._commit_seconds:
                self._commit()
        progress.source, progress.records, progress.check = source_id + 1, 0, 0

    def _commit(self) -> None:
        written = self._writer.commit()
        progress = self.progress
        self._journal.write(
            self._identity,
            {
                "source": progress.source,
                "records": progress.records,
                "check": progress.check,
                "counts": counts_as_json(progress.counts),
                "schemas": progress.schemas,
                "written": written,
            },
        )
        self._committed = time.monotonic()

    def finish(self) -> str:
        """Complete the store; returns its digest."""
        counts = self.progress.counts
        if not counts[why.GROUPS_KEPT]:
            raise DataError(
                "no group was kept, so no store is written; change the policy that dropped them:\n"
                + summary_table(counts)
            )
        described = [{"path": path, "schema": name} for path, name in zip(self._sources, self.progress.schemas)]
        return self._writer.finish(sources=described, counts=counts_as_json(counts))

    def close(self) -> None:
        """Release the files."""
        self._writer.close()


def _detection_records(
    schema_name: str, first: list[tuple[Raw, int]], wheres: list[str]
) -> list[tuple[dict[str, Any], str]]:
    if schema_name != "auto":
        return []
    return [(parse_raw(raw, where), where) for (raw, _), where in zip(first, wheres)]


def _progress_from_json(record: dict[str, Any]) -> _Progress:
    return _Progress(
        source=record["source"],
        records=record["records"],
        check=record["check"],
        counts=counts_from_json(record["counts"]),
        schemas=record["schemas"],
        written=Written(**record["written"]),
    )


def _chunks(raws: Iterable[tuple[Raw, int]], source: str, schema: str) -> Iterator[Chunk]:
    """The records in pieces of bounded size."""
    chunk, size = Chunk(source, schema, [], []), 0
    for raw, row in raws:
        chunk.raws.append(raw)
        chunk.rows.append(row)
        size += approximate_size(raw)
        if len(chunk.rows) == _CHUNK_RECORDS or size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = Chunk(source, schema, [], []), 0
    if chunk.rows:
        yield chunk


def _check(raw: Raw, check: int) -> int:
    return zlib.crc32(raw if isinstance(raw, bytes) else repr(raw).encode("utf-8", "backslashreplace"), check)


def _with_date(options: PreprocessOptions, tokenizer: Tokenizer, output: Path) -> PreprocessOptions:
    """The options with the date that a template which asks for one is told: the day the store was begun."""
    if not asks_for_date(tokenizer):
        if options.tokenize.template_date is not None:
            raise ConfigError(
                "--template-date is for chat templates that ask for the date, and this does not; leave it out"
            )
        return options
    if options.tokenize.template_date is not None:
        return options
    found = begun_at(output).read()
    date = None if found is None else found[0].get("options", {}).get("tokenize", {}).get("template_date")
    date = date or datetime.date.today().isoformat()
    return replace(options, tokenize=replace(options.tokenize, template_date=date))


def _identity(options: PreprocessOptions, tokenizer: Tokenizer) -> StoreIdentity:
    weights = options.schema_options.score_weights
    return StoreIdentity(
        tokenizer=describe(
            tokenizer,
            replace(
                options.tokenizer,
                model=str(_absolute(options.tokenizer.model)),
                chat_template=_absolute(options.tokenizer.chat_template),
            ),
        ),
        options={
            "schema": options.schema,
            "score_weights": None if weights is None else dict(weights),
            "partition": asdict(options.partition),
            "tokenize": asdict(options.tokenize),
            "on_bad_record": options.on_bad_record,
            "rendering": RENDERING,
        },
    )


def _absolute(path: str | None) -> str | None:
    """The path as seen from any folder; a hub name as it is."""
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path


MarkedChunks = Iterable[tuple[Chunk, int]]
PrepareChunks = Callable[[MarkedChunks], Iterator[tuple[Prepared, int, int]]]


@contextmanager
def _preparing(preparer: GroupPreparer, options: PreprocessOptions, workers: int) -> Iterator[PrepareChunks]:
    """``prepare_chunks(marked_chunks)``, in this process or spread over worker processes.

    Gives (what became of a chunk, its number of records, its mark), in order.
    """
    if workers == 1:

        def in_process(chunks: MarkedChunks) -> Iterator[tuple[Prepared, int, int]]:
            for chunk, mark in chunks:
                yield prepare_chunk(preparer, chunk), len(chunk.rows), mark

        yield in_process
        return

    # spawn: a forked tokenizer may hold a lock of its thread pool
    spawn = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=spawn, initializer=start_worker, initargs=(options,))

    def in_workers(chunks: MarkedChunks) -> Iterator[tuple[Prepared, int, int]]:
        pending: deque[tuple[Future[Prepared], int, int]] = deque()  # bounded: reading never runs far ahead
        unread = iter(chunks)
        failure: DataError | None = None
        while True:
            try:
                chunk, mark = next(unread)
                pending.append((executor.submit(work, chunk), len(chunk.rows), mark))
            except StopIteration:
                break
            except DataError as error:  # of a later record than those on their way: theirs come first
                failure = error
                break
            if len(pending) >= 4 * workers:
                future, num_records, mark = pending.popleft()
                yield future.result(), num_records, mark
        for future, num_records, mark in pending:
            yield future.result(), num_records, mark
        if failure is not None:
            raise failure

    try:
        yield in_workers
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, most often for want of memory; run the command again with fewer --workers: "
            "it goes on where it was"
        ) from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
