"""What is written is read back; what was cut short or changed is never read."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from data_makers import largest_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_groupdpo.data.preprocess.work_folder import whole_folder
from megatron_groupdpo.data.store import format as fmt
from megatron_groupdpo.data.store.indexed import IndexedReader, token_dtype, write_index
from megatron_groupdpo.data.store.reader import TokenStore
from megatron_groupdpo.data.store.writer import PreparedGroup, StoreIdentity, StoreWriter, Written
from megatron_groupdpo.errors import DataError

IDENTITY = {"kind": "SentencePieceTokenizer", "model": "m", "chat_template": None, "digest": "d", "vocab_size": 70_000}


def group(prompt: list[int], *responses: list[int], masks=None, values=None, ref_logps=None, row=1) -> PreparedGroup:
    size = len(responses)
    return PreparedGroup(
        prompt_tokens=np.array(prompt, dtype=np.int32),
        response_tokens=tuple(np.array(tokens, dtype=np.int32) for tokens in responses),
        response_masks=tuple(masks or [None] * size),
        labels=tuple(1 if k == 0 else -1 for k in range(size)),
        values=tuple(values or [math.nan] * size),
        ref_logps=tuple(ref_logps or [math.nan] * size),
        source_row=row,
    )


def write_into(folder: Path, groups: list[PreparedGroup] | None = None, vocab_size: int = 70_000) -> None:
    identity = StoreIdentity(tokenizer=IDENTITY | {"vocab_size": vocab_size}, options={"seq_length": 64})
    with closing(StoreWriter(folder, identity)) as writer:
        for item in groups or THREE:
            writer.add(item, 0)
        finish(writer)


def finish(writer: StoreWriter) -> str:
    return writer.finish(sources=[{"path": "in.jsonl", "schema": "canonical"}], counts=[])


def write(path: Path, groups: list[PreparedGroup], *, overwrite: bool = False, vocab_size: int = 70_000) -> Path:
    with whole_folder(path, overwrite=overwrite) as folder:
        write_into(folder, groups, vocab_size)
    return path


THREE = [
    group([5, 6], [7, 2], [8, 9, 2], values=[1.5, -2.0], row=1),
    group([1], [69_999], row=4),
    group([5, 5, 5], [3, 2], [4, 2], [5, 2], masks=[None, np.array([True, False]), None], row=5),
]


def test_groups_come_back_as_written(tmp_path: Path):
    store = TokenStore.open(write(tmp_path / "s", THREE))
    assert len(store) == 3
    assert store.num_responses == 6
    for group_id, (sample, item) in enumerate(zip(store, THREE, strict=True)):
        assert sample.group_id == group_id
        assert sample.prompt_tokens.tolist() == item.prompt_tokens.tolist()
        assert [t.tolist() for t in sample.response_tokens] == [t.tolist() for t in item.response_tokens]
        assert sample.labels_K.tolist() == list(item.labels)
        np.testing.assert_array_equal(sample.values_K, np.array(item.values, dtype=np.float32))
        for mask, expected in zip(sample.response_masks, item.response_masks, strict=True):
            assert (mask is None) == (expected is None)
            assert expected is None or mask.tolist() == expected.tolist()
        assert sample.prompt_tokens.dtype == np.int32
        assert sample.labels_K.dtype == np.int8
        assert sample.values_K.dtype == np.float32
    assert [store[i].first_response_id for i in range(3)] == [0, 2, 3]
    assert store.prompt_lengths_G.tolist() == [2, 1, 3]
    assert store.response_lengths_R.tolist() == [2, 3, 1, 2, 2, 2]
    assert store.meta["max_row_tokens"] == 5
    assert store.meta["num_tokens"] == 18
    assert store.where(1) == "in.jsonl:4"
    assert store.ref_logps_R is None
    with pytest.raises(IndexError):
        store[3]
    store.verify()


def test_reference_log_probabilities_are_kept_where_given(tmp_path: Path):
    store = TokenStore.open(write(tmp_path / "s", [THREE[0], group([1], [2], [3], ref_logps=[-1.25, -7.0])]))
    np.testing.assert_array_equal(store.ref_logps_R, [math.nan, math.nan, -1.25, -7.0])


def test_a_store_crosses_processes_without_its_contents(tmp_path: Path):
    store = TokenStore.open(write(tmp_path / "s", THREE))
    dumped = pickle.dumps(store)
    assert len(dumped) < 1000
    assert pickle.loads(dumped)[2].prompt_tokens.tolist() == [5, 5, 5]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 69_999), min_size=1, max_size=5),
            st.lists(st.lists(st.integers(0, 69_999), min_size=1, max_size=5), min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([60_000, 70_000]),
)
def test_any_ragged_groups_come_back(tmp_path: Path, groups, vocab_size):
    groups = [([t % vocab_size for t in p], [[t % vocab_size for t in r] for r in rs]) for p, rs in groups]
    path = write(tmp_path / "s", [group(p, *rs) for p, rs in groups], overwrite=True, vocab_size=vocab_size)
    read = [(s.prompt_tokens.tolist(), [t.tolist() for t in s.response_tokens]) for s in TokenStore.open(path)]
    assert read == groups


def files_of(path: Path) -> Iterator[Path]:
    return (file for file in sorted(path.iterdir()) if file.name != fmt.META)


def test_every_cut_or_changed_file_is_refused(tmp_path: Path):
    path = write(tmp_path / "s", THREE)
    assert len(list(files_of(path))) == 13
    for file in files_of(path):
        content = file.read_bytes()
        file.write_bytes(content[:-1])
        with pytest.raises(DataError, match=f"{file.name}: the store is cut short"):
            TokenStore.open(path)
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DataError, match=f"{file.name}: its digest does not match"):
            TokenStore.open(path)
        file.unlink()
        with pytest.raises(DataError, match=f"{file.name}: missing"):
            TokenStore.open(path)
        file.write_bytes(content)
    TokenStore.open(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta["options"].update(seq_length=8), "the file was changed"),
        (lambda meta: meta["tokenizer"].update(digest="other"), "the file was changed"),
        (lambda meta: meta["files"].pop("labels.npy"), "the file was changed"),
        (lambda meta: meta.update(version=99), "format version 99"),
        (lambda meta: meta.update(format="something"), "not the description of a token store"),
        (lambda meta: meta.update(num_groups=2), "the file was changed"),
        (lambda meta: meta.pop("files"), "the file was changed"),
    ],
)
def test_a_changed_description_is_refused(tmp_path: Path, change, message):
    path = write(tmp_path / "s", THREE)
    meta = json.loads((path / fmt.META).read_text())
    change(meta)
    (path / fmt.META).write_text(json.dumps(meta))
    with pytest.raises(DataError, match=message):
        TokenStore.open(path)


def test_what_is_no_store_is_refused(tmp_path: Path):
    for content, message in [(None, "no meta.json"), ("{", "cannot be read"), ("[]", "not the description")]:
        if content is not None:
            (tmp_path / fmt.META).write_text(content)
        with pytest.raises(DataError, match=message):
            TokenStore.open(tmp_path)
    with pytest.raises(DataError, match="no such token store"):
        TokenStore.open(tmp_path / "none")


def test_verify_reads_what_open_samples(tmp_path: Path):
    tokens = np.arange(3_000_000, dtype=np.int32)
    path = write(tmp_path / "s", [group([1], tokens.tolist(), [2])])
    store = TokenStore.open(path)
    assert (path / "tokens.bin").stat().st_size > 64 << 16
    with open(path / "tokens.bin", "r+b") as stream:
        stream.seek(70_000)  # between the first sampled block and the second
        stream.write(b"\xff")
    TokenStore.open(path)
    with pytest.raises(DataError, match=r"tokens\.bin: its digest does not match"):
        store.verify()


def test_the_digest_follows_the_contents_alone(tmp_path: Path):
    first, second = write(tmp_path / "a", THREE), write(tmp_path / "b", THREE)
    other = write(tmp_path / "c", [*THREE[:2], group([5, 5, 5], [3, 2], [4, 2], [5, 3])])
    digests = [TokenStore.open(path).digest for path in (first, second, other)]
    assert digests[0] == digests[1] != digests[2]


def test_a_failed_write_leaves_nothing_and_keeps_what_was_there(tmp_path: Path):
    path = write(tmp_path / "s", THREE)
    digest = TokenStore.open(path).digest
    with pytest.raises(RuntimeError), whole_folder(path, overwrite=True) as folder:  # noqa: PT012
        (folder / "half").write_text("x")
        raise RuntimeError
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]
    assert TokenStore.open(path).digest == digest


def test_an_existing_store_is_replaced_only_on_request(tmp_path: Path):
    path = write(tmp_path / "s", THREE)
    with pytest.raises(DataError, match="--overwrite"):
        write(path, THREE[:1])
    assert len(TokenStore.open(path)) == 3
    assert len(TokenStore.open(write(path, THREE[:1], overwrite=True))) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def test_overwrite_never_replaces_what_is_no_store(tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("x")
    with pytest.raises(DataError, match="replaces token stores only"):
        write(tmp_path / "thesis", THREE, overwrite=True)
    assert (tmp_path / "thesis" / "chapter").read_text() == "x"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", THREE)


@pytest.mark.parametrize("num_bytes", [10, 200, 2000, 4500])
def test_a_full_disk_leaves_nothing(tmp_path: Path, num_bytes: int):
    tokens = np.arange(1000, dtype=np.int32).tolist()  # in headers, arrays, the index, meta.json
    with (
        pytest.raises(DataError, match=r"writing failed \(File too large\); nothing was kept"),
        largest_file(num_bytes),
    ):
        write(tmp_path / "s", [*THREE, group([1], tokens), *[group([1], [2])] * 200])
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, pathlib, sys
from megatron_groupdpo.data.preprocess.work_folder import whole_folder
with whole_folder(pathlib.Path(sys.argv[1]), overwrite=False) as folder:
    (folder / "half").write_text("x")
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_run_left_is_no_store_and_is_not_in_the_way(tmp_path: Path):
    root = str(Path(__file__).resolve().parents[3])
    environment = os.environ | {"PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "s")], env=environment, timeout=120)
    assert [entry.name for entry in tmp_path.iterdir()] == [".s.partial"]
    write(tmp_path / "s", THREE)
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]
    assert not (tmp_path / "s" / "half").exists()


def test_two_runs_never_make_one_store_at_once(tmp_path: Path):
    with whole_folder(tmp_path / "s", overwrite=False) as folder:
        with pytest.raises(DataError, match="another run is making it now"):
            write(tmp_path / "s", THREE)
        write_into(folder, THREE)
    assert len(TokenStore.open(tmp_path / "s")) == 3


def test_a_kill_while_one_store_replaces_another_loses_neither(tmp_path: Path):
    path = write(tmp_path / "s", THREE)
    digest = TokenStore.open(path).digest
    (tmp_path / ".s.partial").mkdir()
    path.rename(tmp_path / ".s.partial" / "replaced")  # the state between the two renames
    with pytest.raises(DataError, match="exists already"):
        write(path, THREE[:1])
    assert TokenStore.open(path).digest == digest


@pytest.mark.parametrize("num_before", [0, 1, 2, 3])
def test_a_write_goes_on_from_its_last_commit(tmp_path: Path, num_before: int):
    identity = StoreIdentity(tokenizer=IDENTITY, options={"seq_length": 64})
    groups = [*THREE, group([9], [1], [2], ref_logps=[-1.0, -2.0])]
    expected = TokenStore.open(write(tmp_path / "whole", groups)).digest
    folder = tmp_path / "parts"
    folder.mkdir()
    writer = StoreWriter(folder, identity)
    for item in groups[:num_before]:
        writer.add(item, 0)
    written = writer.commit()
    for item in groups[num_before:]:
        writer.add(item, 0)
    writer.close()
    (folder / "tokens.idx").write_text("half")
    (folder / fmt.META).write_text("half")
    writer = StoreWriter(folder, identity, Written(**written))
    for item in groups[num_before:]:
        writer.add(item, 0)
    assert finish(writer) == expected


def test_less_than_was_committed_is_refused(tmp_path: Path):
    identity = StoreIdentity(tokenizer=IDENTITY, options={})
    writer = StoreWriter(tmp_path, identity)
    writer.add(THREE[0], 0)
    written = writer.commit()
    writer.close()
    with open(tmp_path / "labels.npy", "r+b") as stream:
        stream.truncate(129)
    with pytest.raises(ValueError, match=r"labels\.npy: 129 bytes are there, 2 numbers of int8 were written"):
        StoreWriter(tmp_path, identity, Written(**written))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=4), min_size=1, max_size=4), min_size=1),
    st.integers(1, 5),
    st.sampled_from([np.uint16, np.int32, np.uint8]),
)
def test_the_index_is_megatrons_byte_for_byte(tmp_path: Path, documents, block, dtype):
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(np.concatenate(document), [len(sequence) for sequence in document])
    builder.finalize(str(tmp_path / "theirs.idx"))

    def blocks(values: list[int]):
        return lambda: (np.array(values[i : i + block]) for i in range(0, len(values), block))

    lengths = [len(sequence) for document in documents for sequence in document]
    sizes = [len(document) for document in documents]
    write_index(tmp_path / "ours", dtype, sequence_lengths=blocks(lengths), document_sizes=blocks(sizes))
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    sequences = [sequence for document in documents for sequence in document]
    bounds = np.cumsum([0, *sizes]).tolist()
    reader = IndexedReader(tmp_path / "theirs")
    assert [tokens.tolist() for tokens in reader.read(0, len(reader))] == sequences
    assert [tokens.tolist() for tokens in reader.read(len(reader) // 2, len(reader))] == sequences[len(reader) // 2 :]
    assert reader.document_indices.tolist() == bounds
    shutil.copy(tmp_path / "theirs.bin", tmp_path / "ours.bin")
    megatrons = IndexedDataset(str(tmp_path / "ours"))
    assert [megatrons[index].tolist() for index in range(len(megatrons))] == sequences
    assert megatrons.document_indices.tolist() == bounds


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: b"other" + whole[5:], "not the index of a Megatron indexed dataset"),
        (lambda whole: whole[:20], "not the index of a Megatron indexed dataset"),
        (lambda whole: whole[:9] + b"\x02" + whole[10:], "version 2"),
        (lambda whole: whole[:17] + b"\x63" + whole[18:], "dtype code 99"),
        (lambda whole: whole[:-1], "do not make an index of 2 sequences"),
    ],
    ids=["magic", "header cut", "version", "dtype", "cut"],
)
def test_a_damaged_index_is_refused(tmp_path: Path, damage, message: str):
    lengths, sizes = (lambda: iter([np.array([3, 2])])), (lambda: iter([np.array([2])]))
    write_index(tmp_path / "a", np.int32, sequence_lengths=lengths, document_sizes=sizes)
    index = tmp_path / "a.idx"
    (tmp_path / "a.bin").write_bytes(bytes(20))
    assert [len(tokens) for tokens in IndexedReader(tmp_path / "a").read(0, 2)] == [3, 2]
    index.write_bytes(damage(index.read_bytes()))
    with pytest.raises(DataError, match=message):
        IndexedReader(tmp_path / "a")


def test_token_types_are_those_that_megatron_chooses():
    for size in (1, 65_499, 65_500, 65_536, 200_000):
        assert token_dtype(size) is DType.optimal_dtype(size)


def test_workers_import_no_more_than_they_need():
    """Every worker process pays for it: Megatron alone is 3 seconds and 180 MB."""
    code = (
        "import sys\n"
        "import megatron_groupdpo.data.preprocess.pipeline\n"
        "import megatron_groupdpo.data.store.reader\n"
        "assert not {'torch', 'megatron'} & sys.modules.keys(), 'preprocessing'\n"
        "import megatron_groupdpo.run.batches\n"
        "assert 'megatron' not in sys.modules, 'batches made ahead'\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
