import json
import sysconfig
from pathlib import Path

import datasets
import pytest

from saetrack.lm import DatasetCorpus
from saetrack.lm import corpus as corpus_module
from saetrack.lm.corpus import Corpus, StdlibCorpus, TextCorpus

ROWS = {"text": ["first", "", "third"], "title": ["a", "b", "c"]}


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.fixture
def saved_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The same rows as json lines and as `save_to_disk` writes them, with and without splits."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict(ROWS)
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "saved_splits")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    return {
        "lines": write(tmp_path / "lines", {"train.jsonl": lines}),
        "saved": tmp_path / "saved",
        "saved_splits": tmp_path / "saved_splits",
    }


def test_the_standard_library_is_a_corpus_of_megabytes() -> None:
    corpus = StdlibCorpus()
    documents = list(corpus.documents())
    assert Path(json.__file__).read_text(encoding="utf-8") in documents
    assert sum(map(len, documents)) > 5_000_000
    assert all(documents)
    assert corpus.identity == StdlibCorpus().identity


def test_the_standard_library_is_read_in_order_without_other_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: dict[str, str | bytes] = {
        "b.py": "b",
        "a/z.py": "z",
        "a.py": "a",
        "bad.py": b"\xff\xfe",
        "empty.py": "",
        "notes.txt": "no",
        "site-packages/other.py": "no",
        "a/__pycache__/z.py": "no",
    }
    write(tmp_path, files)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    before = StdlibCorpus()
    assert list(before.documents()) == ["a", "z", "b"]
    identity = before.identity
    write(tmp_path, {"b.py": "B"})
    assert StdlibCorpus().identity != identity


def test_a_python_without_source_files_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="TextCorpus"):
        list(StdlibCorpus().documents())


def test_text_files_are_read_once_in_the_order_of_their_paths(tmp_path: Path) -> None:
    write(tmp_path, {"b.txt": "b", "a.txt": "a", "deep/er/c.txt": "c", "blank.txt": " \n", "d.md": "d"})
    patterns = [str(tmp_path / "**/*.txt"), str(tmp_path / "b.txt")]
    assert list(TextCorpus(patterns).documents()) == ["a", "b", "c"]


@pytest.mark.parametrize("read", [1, 2, 3, 1000], ids=lambda n: f"{n} characters at a time")
def test_a_separator_splits_a_file_wherever_its_reads_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: int
) -> None:
    monkeypatch.setattr(corpus_module, "_READ_CHARACTERS", read)
    write(tmp_path, {"a.txt": "one<|>two <| not<|>\n<|><|>threé", "b.txt": "four<|>"})
    corpus = TextCorpus([str(tmp_path / "*.txt")], separator="<|>")
    assert list(corpus.documents()) == ["one", "two <| not", "threé", "four"]


def test_a_text_corpus_is_known_by_its_text_not_its_place(tmp_path: Path) -> None:
    def identity(folder: str, text: str, separator: str | None = None) -> str:
        write(tmp_path / folder, {"a.txt": text})
        return TextCorpus([str(tmp_path / folder / "*.txt")], separator).identity

    first = identity("here", "text")
    assert identity("there", "text") == first
    assert len({first, identity("there", "texts"), identity("there", "text", "|")}) == 3


def test_wrong_text_files_are_named(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": b"caf\xe9"})
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8"):
        list(TextCorpus([str(tmp_path / "*.txt")]).documents())
    with pytest.raises(FileNotFoundError, match=r"\*\.md' matches no file"):
        list(TextCorpus([str(tmp_path / "*.txt"), str(tmp_path / "*.md")]).documents())
    with pytest.raises(FileNotFoundError, match="empty"):
        list(TextCorpus([]).documents())
    with pytest.raises(ValueError, match="separator is empty"):
        TextCorpus(["a.txt"], separator="")


@pytest.mark.parametrize(
    ("kind", "streaming"),
    [("lines", False), ("lines", True), ("saved", False), ("saved_splits", False)],
    ids=["plain", "streaming", "saved", "saved with splits"],
)
def test_a_data_set_is_read_however_it_is_kept(saved_rows: dict[str, Path], kind: str, streaming: bool) -> None:
    def corpus(column: str) -> Corpus:
        return DatasetCorpus(str(saved_rows[kind]), column=column, streaming=streaming)

    assert list(corpus("text").documents()) == ["first", "third"]
    assert corpus("text").identity == corpus("text").identity != corpus("title").identity
    with pytest.raises(ValueError, match=r"has no column 'body'.*\['text', 'title'\]"):
        list(corpus("body").documents())


def test_a_data_set_that_cannot_be_read_that_way_says_how(saved_rows: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"'test'.*\['train'\]"):
        list(DatasetCorpus(str(saved_rows["saved_splits"]), split="test").documents())
    with pytest.raises(ValueError, match="cannot be streamed"):
        list(DatasetCorpus(str(saved_rows["saved"]), streaming=True).documents())


def test_a_data_set_in_a_folder_is_known_by_its_files(saved_rows: dict[str, Path]) -> None:
    folder = saved_rows["lines"]
    before = DatasetCorpus(str(folder)).identity
    write(folder, {"train.jsonl": '{"text": "other", "title": "a"}\n'})
    assert DatasetCorpus(str(folder)).identity != before
