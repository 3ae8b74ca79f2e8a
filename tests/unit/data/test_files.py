"""Every readable kind gives the same records; every unreadable one says where and why."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_groupdpo.data.files.reader import count_records, expand_inputs, read_records
from megatron_groupdpo.errors import DataError

RECORDS = [{"prompt": f"é {i}", "responses": ["a", "b"], "rewards": [0.5, float(i)]} for i in range(5)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def write_all_kinds(folder: Path) -> None:
    (folder / "a.jsonl").write_text(LINES)
    (folder / "b.json").write_text(json.dumps(RECORDS, indent=2))
    (folder / "c.json").write_text(LINES)
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    (folder / "e.jsonl.zst").write_bytes(zstandard.compress(LINES.encode()))
    (folder / "f.json.gz").write_bytes(gzip.compress(json.dumps(RECORDS).encode()))
    (folder / "f2.json").write_text(json.dumps(RECORDS[0], indent=2))
    (folder / "g.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n\r\n").encode())
    dataset = datasets.Dataset.from_list(RECORDS)
    dataset.to_parquet(folder / "h.parquet")
    dataset.save_to_disk(folder / "saved")
    (folder / "saved" / "data-00000-of-00001.arrow").rename(folder / "i.arrow")


def test_every_kind_gives_the_same_records(tmp_path: Path):
    write_all_kinds(tmp_path)
    sources = [source for source in expand_inputs([str(tmp_path)]) if not source.startswith(str(tmp_path / "saved"))]
    assert [Path(source).name[0] for source in sources] == list("abcdeffghi")
    for source in sources:
        expected = RECORDS[:1] if "f2" in source else RECORDS
        assert [record for record, _ in read_records(source)] == expected, source


def test_mixed_types_in_a_table_come_back_as_they_were(tmp_path: Path):
    records = [{"prompt": "a", "scores": {"u": 1}}, {"prompt": "b", "scores": {"v": [2.5, "x"]}}]
    features = datasets.Features({"prompt": datasets.Value("string"), "scores": datasets.Json()})
    datasets.Dataset.from_list(records, features=features).to_parquet(tmp_path / "a.parquet")
    assert [record for record, _ in read_records(str(tmp_path / "a.parquet"))] == records


def test_a_table_is_read_in_batches_of_one_row_group(tmp_path: Path):
    table = pyarrow.table({"prompt": [f"p{i}" for i in range(1000)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1000)
    with pyarrow.ipc.new_file(str(tmp_path / "b.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=300)
    for name in ("a.parquet", "b.arrow"):
        read = list(read_records(str(tmp_path / name)))
        assert [record["prompt"] for record, _ in read] == [f"p{i}" for i in range(1000)]
        assert [where for _, where in read] == [f"{tmp_path / name}:{row}" for row in range(1, 1001)]


def test_a_saved_dataset_is_one_source(tmp_path: Path):
    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "saved")
    (source,) = expand_inputs([str(tmp_path / "saved")])
    assert [record for record, _ in read_records(source)] == RECORDS


def test_a_dataset_by_name_is_read_by_split(tmp_path: Path):
    """``datasets`` takes a local folder where it takes a name of the hub."""
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(LINES)
    (folder / "test.jsonl").write_text(json.dumps(RECORDS[3]) + "\n")
    for given, expected in [("", RECORDS), (":train", RECORDS), (":test", RECORDS[3:4])]:
        (source,) = expand_inputs([f"hf:{folder}{given}"])
        assert [record for record, _ in read_records(source)] == expected
    assert [where for _, where in read_records(f"hf:{folder}:test")] == [f"hf:{folder}:test:1"]
    for given in (f"hf:{folder}:validation", f"hf:{tmp_path}/none"):
        with pytest.raises(DataError, match=r"^hf:.* cannot be loaded as a dataset .*check the name, the split"):
            list(read_records(given))


def test_globs_and_folders_are_read_in_name_order(tmp_path: Path):
    for name in ("b.jsonl", "a.jsonl", "notes.txt"):
        (tmp_path / name).write_text(LINES)
    expected = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    assert expand_inputs([str(tmp_path)]) == expected
    assert expand_inputs([str(tmp_path / "*.jsonl")]) == expected


def test_a_place_is_file_and_line(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + LINES)
    assert [where for _, where in read_records(str(path))] == [f"{path}:{line}" for line in range(2, 7)]


def test_counts_where_they_are_cheap(tmp_path: Path):
    write_all_kinds(tmp_path)
    assert count_records(str(tmp_path / "a.jsonl")) == 5
    assert count_records(str(tmp_path / "h.parquet")) == 5
    assert count_records(str(tmp_path / "d.jsonl.gz")) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: the file holds no record"),
        ("a.jsonl", b"\n \n", "a.jsonl: the file holds no record"),
        ("a.json", b"[]", "a.json: the file holds no record"),
        ("a.json", b"", "a.json: the file holds no record"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl:2: broken JSON"),
        ("a.json", b'[{"a": 1}, {', "a.json: broken JSON"),
        ("a.json", b'[{"a": 1}, 2]', "a.json:2: a record must be a JSON object, got int"),
        ("a.json", b'[{"a": 1}] {}', "a.json: broken JSON: there is more after the array's end"),
        ("a.json", b'\n{"a": 1}\n{"a":\n', "a.json:3: broken JSON"),
        ("a.json", b'{"a":\n1', "a.json:1: broken JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "a.jsonl:2: a record must be a JSON object, got list"),
        ("a.jsonl", b'{"a": "\xff"}\n', "a.jsonl:1: must be UTF-8"),
        ("a.jsonl", b"[" * 200_000, "a.jsonl:1: broken JSON"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-20], "a.jsonl.gz: the archive is cut short"),
        ("a.jsonl.gz", b"no archive", "a.jsonl.gz: no gzip file, or a damaged one"),
        ("a.jsonl.zst", b"no archive", "a.jsonl.zst: the archive is cut short or damaged"),
        ("a.parquet", b"PAR1 no", "a.parquet: cannot be read as parquet"),
        ("a.arrow", b"no arrow", "a.arrow: cannot be read as arrow"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_records(str(tmp_path / name)))
    assert str(caught.value).startswith(f"{tmp_path}/{message}")


def zstd_of_many_blocks() -> bytes:
    """Two frames; flushing ends a block at each record, so that a cut there leaves whole lines."""
    frames = []
    for _ in range(2):
        compressor = zstandard.ZstdCompressor().compressobj()
        blocks = [
            compressor.compress(json.dumps(record).encode() + b"\n")
            + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
            for record in RECORDS
        ]
        frames.append(b"".join(blocks) + compressor.flush())
    return b"".join(frames)


def test_every_frame_of_a_zstd_archive_is_read(tmp_path: Path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstd_of_many_blocks())
    assert [record for record, _ in read_records(str(path))] == RECORDS * 2


def test_a_zstd_archive_cut_at_any_byte_is_refused(tmp_path: Path):
    whole = zstd_of_many_blocks()
    path = tmp_path / "a.jsonl.zst"
    for cut in range(len(whole)):
        if cut == len(whole) // 2:  # between the frames, where nothing is missing that the format knows of
            continue
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"a\.jsonl\.zst: (the archive is cut short|the file holds no record)"):
            list(read_records(str(path)))


def test_what_is_not_there_is_refused(tmp_path: Path):
    for given, message in [
        (tmp_path / "none.jsonl", "no such file or folder"),
        (tmp_path / "*.jsonl", "matches no file"),
        (tmp_path, "found none"),
    ]:
        with pytest.raises(DataError, match=message):
            expand_inputs([str(given)])
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="unknown kind of file"):
        expand_inputs([str(tmp_path / "a.txt")])


def test_hidden_files_and_metadata_of_a_folder_are_not_records(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / ".cache").mkdir()
    for name in ("data/a.jsonl", "data/._a.jsonl", ".cache/b.jsonl", "dataset_infos.json"):
        (tmp_path / name).write_text('{"a": 1}\n')
    assert expand_inputs([str(tmp_path)]) == (str(tmp_path / "data/a.jsonl"),)


def test_a_dataset_of_several_splits_asks_for_their_names(tmp_path):
    import datasets

    part = datasets.Dataset.from_list([{"a": 1}])
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=r"several splits .*d/test, .*d/train"):
        expand_inputs([str(tmp_path / "d")])
    assert [record for record, _ in read_records(str(tmp_path / "d" / "train"))] == [{"a": 1}]


def test_a_file_given_twice_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: given twice"):
        expand_inputs([str(tmp_path), str(tmp_path / "a.jsonl")])
