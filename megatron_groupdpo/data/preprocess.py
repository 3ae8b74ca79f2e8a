"""Files in, token store out: read, prepare (in worker processes where asked), write.

The order of the groups is the order of the input, whatever the number of workers.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_groupdpo.data import counts as why
from megatron_groupdpo.data.counts import Counts, counts_as_json, summary_table
from megatron_groupdpo.data.files import RawRecord, expand_inputs, read_records
from megatron_groupdpo.data.prepare import (
    GroupPreparer,
    Prepared,
    PreprocessOptions,
    prepare_chunk,
    start_worker,
    work,
)
from megatron_groupdpo.data.schemas import Schema, choose_schema, schema_named
from megatron_groupdpo.data.store import StoreIdentity, StoreWriter
from megatron_groupdpo.data.store_format import whole_folder
from megatron_groupdpo.data.tokenizer import Tokenizer, canonical_kind, load_tokenizer
from megatron_groupdpo.errors import ConfigError, DataError

NUM_DETECTION_RECORDS = 16
_CHUNK = 64  # records a worker takes at once


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessReport:
    """What came of it."""

    counts: Counts
    schemas: tuple[tuple[str, str], ...]
    """(source, schema name)."""
    digest: str
    """The store's."""


def preprocess(
    inputs: Iterable[str],
    output: Path,
    options: PreprocessOptions,
    *,
    overwrite: bool = False,
    workers: int = 1,
    on_schema: Callable[[str, Schema], None] = lambda source, schema: None,
    on_progress: Callable[[int], object] = lambda num_records: None,
) -> PreprocessReport:
    """Build a token store at ``output``; it appears there whole or not at all.

    ``on_schema`` hears the schema of each source; ``on_progress`` the number of records done since the last call.

    Raises:
        DataError: bad input, an existing ``output`` without ``overwrite``, or nothing left to write.
        ConfigError: contradicting options.
    """
    if workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {workers}")
    sources = expand_inputs(list(inputs))
    tokenizer = load_tokenizer(options.tokenizer)
    preparer = GroupPreparer(options, tokenizer)
    counts, schemas = Counts(), []
    with whole_folder(output, overwrite=overwrite) as folder:
        writer = StoreWriter(folder, _identity(options, tokenizer))
        with closing(writer), _preparing(preparer, options, workers) as prepare_chunks:
            for source_id, source in enumerate(sources):
                schema, records = _with_schema(options.schema, source)
                schemas.append((source, schema.name))
                on_schema(source, schema)
                for groups, chunk_counts in prepare_chunks(schema.name, records):
                    for group in groups:
                        writer.add(group, source_id)
                    counts.update(chunk_counts)
                    on_progress(chunk_counts[why.GROUPS_READ])
            if not counts[why.GROUPS_KEPT]:
                raise DataError(
                    "no group was kept, so no store is written; change the policy that dropped them:\n"
                    + summary_table(counts)
                )
            described = [{"path": path, "schema": name} for path, name in schemas]
            digest = writer.finish(sources=described, counts=counts_as_json(counts))
    return PreprocessReport(counts=counts, schemas=tuple(schemas), digest=digest)


def _with_schema(name: str, source: str) -> tuple[Schema, Iterator[tuple[RawRecord, str]]]:
    records = read_records(source)
    first = list(itertools.islice(records, NUM_DETECTION_RECORDS))
    return choose_schema(name, first), itertools.chain(first, records)


def _identity(options: PreprocessOptions, tokenizer: Tokenizer) -> StoreIdentity:
    weights = options.schema_options.score_weights
    return StoreIdentity(
        tokenizer={
            "kind": canonical_kind(options.tokenizer.kind),
            "model": _absolute(options.tokenizer.model),
            "chat_template": _absolute(options.tokenizer.chat_template),
            "digest": tokenizer.digest,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "pad_id": tokenizer.pad_id,
        },
        options={
            "schema": options.schema,
            "score_weights": None if weights is None else dict(weights),
            "partition": asdict(options.partition),
            "tokenize": asdict(options.tokenize),
            "on_bad_record": options.on_bad_record,
        },
    )


def _absolute(path: str | None) -> str | None:
    """The path as seen from any folder; a hub name as it is."""
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path


Records = Iterable[tuple[RawRecord, str]]
PrepareChunks = Callable[[str, Records], Iterator[Prepared]]


@contextmanager
def _preparing(preparer: GroupPreparer, options: PreprocessOptions, workers: int) -> Iterator[PrepareChunks]:
    """``prepare_chunks(schema_name, records)``, in this process or spread over worker processes."""
    if workers == 1:

        def in_process(schema_name: str, records: Records) -> Iterator[Prepared]:
            schema = schema_named(schema_name)
            for chunk in itertools.batched(records, _CHUNK):
                yield prepare_chunk(preparer, schema, list(chunk))

        yield in_process
        return

    # spawn: a forked tokenizer may hold a lock of its thread pool
    with multiprocessing.get_context("spawn").Pool(workers, start_worker, (options,)) as pool:

        def in_workers(schema_name: str, records: Records) -> Iterator[Prepared]:
            pending: deque[Any] = deque()  # bounded, so that reading never runs far ahead of tokenizing
            for chunk in itertools.batched(records, _CHUNK):
                pending.append(pool.apply_async(work, (schema_name, list(chunk))))
                if len(pending) >= 4 * workers:
                    yield pending.popleft().get()
            while pending:
                yield pending.popleft().get()

        yield in_workers
