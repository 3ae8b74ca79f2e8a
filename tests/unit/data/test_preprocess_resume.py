"""A run that is killed and started again gives the store that an undisturbed run gives, byte for byte."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import psutil
import pytest
from data_makers import largest_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_groupdpo.data import counts as why
from megatron_groupdpo.data.preprocess.partition import Partition
from megatron_groupdpo.data.preprocess.pipeline import Listeners, preprocess
from megatron_groupdpo.data.preprocess.prepare import PreprocessOptions
from megatron_groupdpo.data.store.reader import TokenStore
from megatron_groupdpo.data.text.tokenize import TokenizeOptions
from megatron_groupdpo.data.text.tokenizer import TokenizerOptions
from megatron_groupdpo.errors import DataError, UserError

NUM_RECORDS = 300  # five chunks


class Killed(BaseException):
    """Like a signal: no handler of ours may catch it."""


def records(first: int = 0) -> list[dict]:
    """Every third group is dropped, and masks, values and ref_logps come and go."""
    made = []
    for i in range(first, first + NUM_RECORDS):
        responses: list[dict] = [{"text": f"{i} is {k}", "label": 1 if k % 2 or i % 3 == 0 else -1} for k in range(3)]
        if i >= 150:
            for response in responses:
                response |= {"score": i + 0.5, "ref_logp": -float(i)}
        made.append({"prompt": f"Anna has {i}", "responses": responses})
    return made


def write_jsonl(path: Path) -> Path:
    path.write_text("".join(json.dumps(r) + "\n\n" for r in records()))
    return path


def write_json(path: Path) -> Path:
    path.write_text(json.dumps(records(), indent=1))
    return path


def write_gz(path: Path) -> Path:
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in records()).encode()))
    return path


def write_parquet(path: Path) -> Path:
    datasets.Dataset.from_list(records()).to_parquet(path)
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    "a.jsonl": write_jsonl,
    "b.json": write_json,
    "c.jsonl.gz": write_gz,
    "d.parquet": write_parquet,
}


def kill_after(num_records: int) -> Listeners:
    seen = 0

    def on_progress(done: int) -> None:
        nonlocal seen
        seen += done
        if seen >= num_records:
            raise Killed

    return Listeners(on_progress=on_progress)


def contents(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    for name, write in WRITERS.items():
        write(folder / name)
    return folder


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 4 * NUM_RECORDS), min_size=1, max_size=3), st.sampled_from([0.0, 0.01, 60.0]))
@pytest.mark.costly
def test_killed_anywhere_the_store_is_the_same(inputs, build, tmp_path, kills, commit_seconds):
    whole = tmp_path / "whole"
    if not whole.exists():
        build(inputs, output=whole)
    build(inputs, output=tmp_path / "again", overwrite=True)  # so that a replaced store is among the states
    for num_records in kills:
        with pytest.raises(Killed):
            build(
                inputs, output=tmp_path / "again", overwrite=True,
                listeners=kill_after(num_records), commit_seconds=commit_seconds,
            )  # fmt: skip
        assert len(TokenStore.open(tmp_path / "again")) == 800, "what was there stays until the new one is whole"
    report = build(inputs, output=tmp_path / "again", overwrite=True, commit_seconds=commit_seconds)
    assert contents(tmp_path / "again") == contents(whole)
    assert report.counts[why.GROUPS_READ] == 4 * NUM_RECORDS
    if commit_seconds == 0 and kills[-1] > NUM_RECORDS:
        assert report.records_resumed > 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["again", "whole"]


def test_the_number_of_workers_may_change_on_the_way(inputs, build, tmp_path):
    build(inputs, output=tmp_path / "whole")
    with pytest.raises(Killed):
        build(inputs, workers=2, listeners=kill_after(500), commit_seconds=0.0)
    report = build(inputs)
    assert 0 < report.records_resumed <= 500
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


@pytest.mark.parametrize("what", ["input", "options", "journal", "cut"])
def test_what_changed_since_is_done_afresh(build, tmp_path, what):
    path = write_jsonl(tmp_path / "in.jsonl")
    with pytest.raises(Killed):
        build(path, listeners=kill_after(200), commit_seconds=0.0)
    partial = tmp_path / ".store.partial"
    options = {}
    if what == "input":
        path.write_text("".join(json.dumps(r) + "\n" for r in records(7)))
    elif what == "options":
        options = {"partition": Partition(max_positives=1)}
    elif what == "journal":
        (partial / "journal.json").write_text((partial / "journal.json").read_text()[:-9])
    else:
        os.truncate(partial / "store" / "labels.npy", 130)
    notes: list[str] = []
    report = build(path, listeners=Listeners(on_note=notes.append), **options)
    assert report.records_resumed == 0
    if what != "journal":  # without it there is nothing to speak of
        assert "starting afresh" in notes[0]
        assert {"input": "sources", "options": "options", "cut": "labels.npy"}[what] in notes[0]
    build(path, output=tmp_path / "whole", **options)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_after_a_full_disk_the_same_command_goes_on(build, tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl")
    build(path, output=tmp_path / "whole")
    size = (tmp_path / "whole" / "tokens.bin").stat().st_size
    message = r"writing failed \(File too large\); what was done stays in .*\.store\.partial"
    with pytest.raises(DataError, match=message), largest_file(size * 2 // 3):
        build(path, commit_seconds=0.0)
    assert not (tmp_path / "store").exists()
    with pytest.raises(DataError, match="not a token store"):
        TokenStore.open(tmp_path / ".store.partial" / "store")
    assert build(path).records_resumed > 0
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_bad_data_leaves_nothing_to_go_on_from(build, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records()) + "{")
    with pytest.raises(DataError, match=":301: broken JSON"):
        build(path, commit_seconds=0.0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_named_dataset_that_changed_since_is_refused(build, tmp_path):
    folder = tmp_path / "named"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records()))
    build(f"hf:{folder}", output=tmp_path / "whole")
    for changed in (False, True):
        with pytest.raises(Killed):
            build(f"hf:{folder}", listeners=kill_after(200), commit_seconds=0.0)
        if changed:
            (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(1)))
            with pytest.raises(DataError, match="the dataset changed since the interrupted run"):
                build(f"hf:{folder}")
        else:
            assert build(f"hf:{folder}").records_resumed > 0
            assert contents(tmp_path / "store") == contents(tmp_path / "whole")
            (tmp_path / "store").rename(tmp_path / "first")


def test_a_worker_that_dies_is_told_of_and_its_work_is_done_again(inputs, build, tmp_path):
    others = set(psutil.Process().children())  # of this test process: other tests' ranks wait for their next job

    def kill_a_worker(done: int) -> None:
        for child in set(psutil.Process().children()) - others:
            with contextlib.suppress(psutil.NoSuchProcess):  # a worker killed at an earlier call
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()

    with pytest.raises(UserError, match="a worker process died"):
        build(inputs, workers=2, listeners=Listeners(on_progress=kill_a_worker), commit_seconds=0.0)
    assert build(inputs).records_resumed > 0
    build(inputs, output=tmp_path / "whole")
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


@pytest.mark.costly
def test_a_killed_command_goes_on_and_its_workers_end(repository, sentencepiece_model, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records() * 60))
    command = [sys.executable, "tools/preprocess_data.py", "--input", path, "--seq-length", "64", "--workers", "2"]
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", sentencepiece_model, "--output"]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    process = subprocess.Popen([*command, tmp_path / "out"], cwd=repository, env=environment, stderr=subprocess.PIPE)
    tokens = tmp_path / ".out.partial" / "store" / "tokens.bin"
    deadline = time.monotonic() + 120
    while not (tokens.exists() and tokens.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    assert not (tmp_path / "out").exists()
    options = PreprocessOptions(
        tokenizer=TokenizerOptions(kind="SentencePieceTokenizer", model=str(sentencepiece_model)),
        tokenize=TokenizeOptions(seq_length=64),
    )
    preprocess([str(path)], tmp_path / "out", options)
    assert len(TokenStore.open(tmp_path / "out")) == 60 * 200
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in.jsonl", "out"]
