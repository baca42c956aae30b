import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saetrack.lm import DatasetCorpus, JsonLinesCorpus, ParquetCorpus, TableCorpus, TokenColumns

Records = dict[str, list[Any]]
TEXTS: Records = {"text": ["first", "", "third", "vierté"], "body": ["a", "b", "c", "d"]}
IDS: Records = {
    "input_ids": [[0, 5, 6, 0, 7], [8, 9, 0], [9, 4]],
    "mask": [[1, 1, 1, 1, 1], [1, 1, 0], [1, 1]],
    "docs": [[3, 3, 3, 4, 4], [4, 5, 5], [5, 5]],
}
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, "": bytes}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    datasets.disable_progress_bars()


def lines(records: Records) -> bytes:
    rows = [dict(zip(records, row, strict=True)) for row in zip(*records.values(), strict=True)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_lines(folder: Path, records: Records, **options: Any) -> TableCorpus:
    (folder / "a.jsonl").write_bytes(lines(records))
    return JsonLinesCorpus([str(folder / "*.jsonl")], **options)


def as_parquet(folder: Path, records: Records, **options: Any) -> TableCorpus:
    pq.write_table(pa.table(records), folder / "a.parquet", row_group_size=2)
    return ParquetCorpus([str(folder / "*.parquet")], **options)


def as_saved(folder: Path, records: Records, **options: Any) -> TableCorpus:
    datasets.Dataset.from_dict(records).save_to_disk(folder / "saved")
    return DatasetCorpus(str(folder / "saved"), **options)


def as_data_set(folder: Path, records: Records, **options: Any) -> TableCorpus:
    pq.write_table(pa.table(records), folder / "a.parquet")
    return DatasetCorpus("parquet", data_files=[str(folder / "*.parquet")], **options)


def as_stream(folder: Path, records: Records, **options: Any) -> TableCorpus:
    return as_data_set(folder, records, streaming=True, **options)


def as_stream_of_lines(folder: Path, records: Records, **options: Any) -> TableCorpus:
    (folder / "a.jsonl").write_bytes(lines(records))
    return DatasetCorpus("json", data_files=[str(folder / "a.jsonl")], streaming=True, **options)


KINDS = [as_lines, as_parquet, as_saved, as_data_set, as_stream, as_stream_of_lines]
each_kind = pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
Make = Callable[..., TableCorpus]


def documents(corpus: TableCorpus, separator: int | None = None) -> list[list[int]]:
    return [document.tokens.tolist() for document in corpus.token_documents(separator)]


@each_kind
def test_rows_are_documents_in_their_order(tmp_path: Path, make: Make) -> None:
    corpus = make(tmp_path, TEXTS)
    assert list(corpus.documents()) == ["first", "third", "vierté"]
    assert list(make(tmp_path, TEXTS, column="body").documents()) == ["a", "b", "c", "d"]
    assert corpus.identity == make(tmp_path, TEXTS).identity
    identities = {
        make(tmp_path, *arguments, **options).identity
        for arguments, options in [
            ((TEXTS,), {}),
            ((TEXTS,), {"column": "body"}),
            ((TEXTS,), {"tokens": TokenColumns()}),
            (({"text": ["other"]},), {}),
        ]
    }
    assert len(identities) == 4


@each_kind
@pytest.mark.parametrize(
    ("columns", "separator", "expected"),
    [
        ({}, None, [[0, 5, 6, 0, 7], [8, 9, 0], [9, 4]]),
        ({}, 0, [[0, 5, 6], [0, 7], [8, 9], [0], [9, 4]]),
        ({"attention_mask": "mask"}, None, [[0, 5, 6, 0, 7], [8, 9], [9, 4]]),
        ({"doc_ids": "docs"}, 0, [[0, 5, 6], [0, 7], [8], [9, 0], [9, 4]]),
        ({"doc_ids": "docs", "across_rows": True}, 0, [[0, 5, 6], [0, 7, 8], [9, 0, 9, 4]]),
        ({"doc_ids": "docs", "across_rows": True, "attention_mask": "mask"}, 0, [[0, 5, 6], [0, 7, 8], [9, 9, 4]]),
    ],
    ids=["rows", "BOS", "padding", "documents", "documents across rows", "documents across rows, padded"],
)
def test_token_columns_become_documents(
    tmp_path: Path, make: Make, columns: dict[str, Any], separator: int | None, expected: list[list[int]]
) -> None:
    corpus = make(tmp_path, IDS, tokens=TokenColumns(**columns))
    assert documents(corpus, separator) == expected
    with pytest.raises(ValueError, match=r"corpus\.tokens is set.*`corpus\.column`"):
        list(corpus.documents())


def test_rows_that_are_all_padding_are_skipped(tmp_path: Path) -> None:
    records = {"input_ids": [[1, 2], [3, 3], [4]], "mask": [[1, 1], [0, 0], [1]], "docs": [[1, 1], [7, 7], [1]]}
    columns = TokenColumns("input_ids", "mask", "docs", across_rows=True)
    assert documents(as_lines(tmp_path, records, tokens=columns)) == [[1, 2, 4]]
    assert documents(as_lines(tmp_path, {"input_ids": [[], [5]]}, tokens=TokenColumns())) == [[5]]


@pytest.mark.parametrize("suffix", PACK)
def test_packed_json_lines_are_unpacked(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"b.jsonl{suffix}").write_bytes(PACK[suffix](b'{"text": "b"}\n\n \n{"text": "c"}'))
    (tmp_path / f"a.jsonl{suffix}").write_bytes(PACK[suffix](b'{"text": "a"}\n'))
    corpus = JsonLinesCorpus([str(tmp_path / f"*.jsonl{suffix}")])
    assert list(corpus.documents()) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', {}, r"a\.jsonl, line 2 is no json \(Expecting value.*Correct or delete"),
        (b'{"text": "a"}\n\n{"text": "\xff"}\n', {}, r"a\.jsonl, line 3 is no json \('utf-8' codec"),
        (b"[" * 100_000, {}, r"a\.jsonl, line 1 is no json"),
        (b'["a"]\n', {}, r"a\.jsonl, line 1 is \['a'\], but expected a json object"),
        (b'{"body": "a"}\n', {}, r"a\.jsonl, line 1 has no column 'text'; it has \['body'\]"),
        (b'{"text": ["a"]}\n', {}, r"a\.jsonl, line 1: column 'text' is \['a'\], but expected text"),
        (b'{"text": "a"}\n', {"column": "x"}, r"no column 'x'; it has \['text'\]"),
        (b'{"input_ids": "a b"}\n', {"tokens": TokenColumns()}, r"'input_ids' is 'a b', but expected a list of integ"),
        (b'{"input_ids": [1.5]}\n', {"tokens": TokenColumns()}, r"line 1: column 'input_ids' is \[1\.5\], but"),
        (b'{"input_ids": [[1]]}\n', {"tokens": TokenColumns()}, r"'input_ids' is \[\[1\]\], but expected a list"),
        (b'{"input_ids": null}\n', {"tokens": TokenColumns()}, r"'input_ids' is None, but expected a list"),
        (
            b'{"input_ids": [1, 2], "mask": [1]}\n',
            {"tokens": TokenColumns(attention_mask="mask")},
            r"line 1: its columns are of different lengths, \{'input_ids': 2, 'mask': 1\}",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, options: dict[str, Any], message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    corpus = JsonLinesCorpus([str(tmp_path / "a.jsonl")], **options)
    with pytest.raises(ValueError, match=message) as raised:
        list(corpus.token_documents(None) if corpus.tokens else corpus.documents())
    assert "\n" not in str(raised.value)


def broken(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: JsonLinesCorpus([broken(f, "a.jsonl.gz", gzip.compress(b"{}")[:-4])]), r"a\.jsonl\.gz cannot be"),
        (lambda f: JsonLinesCorpus([broken(f, "a.jsonl.xz", b"plain")]), r"a\.jsonl\.xz cannot be read"),
        (lambda f: JsonLinesCorpus([broken(f, "a.jsonl.zst", b"")]), r"packed with zstd.*`zstd -d`"),
        (lambda f: ParquetCorpus([broken(f, "a.parquet", b"plain")]), r"a\.parquet cannot be read as parquet"),
        (lambda f: as_parquet(f, TEXTS, column="x"), r"a\.parquet has no column 'x'; it has \['body', 'text'\]"),
        (lambda f: as_parquet(f, {"text": [1, 2]}), r"a\.parquet, row 0 \(the first is 0\): column 'text' is 1, but"),
        (
            lambda f: as_parquet(f, {"input_ids": [[1], [None]]}, tokens=TokenColumns()),
            r"row 1 .*'input_ids' is \[nan\]",
        ),
        (lambda f: as_stream(f, TEXTS, column="x"), r"parquet has no column 'x'; it has \['body', 'text'\]"),
        (lambda f: DatasetCorpus(str(f / "nothing")), r"corpus\.path '.*nothing' cannot be read as a data set"),
        (
            lambda f: DatasetCorpus("json", data_files=[broken(f, "a.jsonl", b'{"text": "a"}\n{"text"')]),
            r"corpus\.path 'json' cannot be read as a data set: JSON parse error",
        ),
        (
            lambda f: DatasetCorpus("json", streaming=True, data_files=[broken(f, "a.jsonl", b'{"text": "a"}\n{"te')]),
            r"corpus\.path 'json' cannot be read as a data set",
        ),
        (lambda f: as_data_set(f, TEXTS, split="test"), r"cannot be read as a data set: Unknown split"),
        (
            lambda f: DatasetCorpus(as_saved(f, TEXTS).path, data_files=["a"]),  # type: ignore[attr-defined]
            r"saved data set and is read whole",
        ),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(
    tmp_path: Path, make: Callable[[Path], TableCorpus], message: str
) -> None:
    corpus = make(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        list(corpus.token_documents(None) if corpus.tokens else corpus.documents())
    assert "\n" not in str(raised.value)


def test_files_that_do_not_exist_are_named(tmp_path: Path) -> None:
    for corpus in (JsonLinesCorpus([str(tmp_path / "x")]), DatasetCorpus("parquet", data_files=[str(tmp_path / "x")])):
        with pytest.raises(FileNotFoundError, match="matches no file"):
            list(corpus.documents())


def test_documents_that_go_on_need_their_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"across_rows is true.*`doc_ids`"):
        documents(as_lines(tmp_path, IDS, tokens=TokenColumns(across_rows=True)))


@pytest.mark.parametrize("make", [as_saved, as_data_set, as_stream], ids=lambda make: make.__name__)
def test_a_shuffle_is_seeded(tmp_path: Path, make: Make) -> None:
    records: Records = {"text": [f"document {i}" for i in range(50)]}
    first, again, other = (list(make(tmp_path, records, shuffle_seed=s).documents()) for s in (1, 1, 2))
    assert first == again != other
    assert sorted(first) == sorted(other) == sorted(records["text"])
    assert first != records["text"]
    identities = {make(tmp_path, records, shuffle_seed=seed).identity for seed in (None, 1, 2)}
    assert len(identities) == 3


def test_a_document_says_where_it_begins(tmp_path: Path) -> None:
    corpus = as_parquet(tmp_path, {"input_ids": [[1], [2, 3]]}, tokens=TokenColumns())
    second = list(corpus.token_documents(None))[1]
    assert second.place == f"{tmp_path}/a.parquet, row 1 (the first is 0)"
    np.testing.assert_array_equal(second.tokens, [2, 3])
