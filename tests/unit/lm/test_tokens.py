import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from saetrack.lm import packing
from saetrack.lm import rows as rows_module
from saetrack.lm import tokens as tokens_module
from saetrack.lm.corpus import Corpus
from saetrack.lm.table_files import JsonLinesCorpus
from saetrack.lm.tables import TokenColumns
from saetrack.lm.tokens import (
    RowSettings,
    TokenizedCorpus,
    TokenRows,
    tokenize_corpus,
    tokenizer_hash,
    usable_counts,
)

SPLITS = ("train", "selection", "evaluation")
CONTEXT = 8


@dataclass(frozen=True)
class ListCorpus(Corpus):
    texts: list[str]

    def documents(self) -> Iterator[str]:
        yield from self.texts

    @property
    def identity(self) -> str:
        return json.dumps({"sha256": hashlib.sha256(repr(self.texts).encode()).hexdigest()})


def character_tokenizer(bos: bool = True, eos: bool = True, fillers: int = 0) -> PreTrainedTokenizerFast:
    """A token a character; BOS is id 0, EOS id 1."""
    vocabulary = {"<bos>": 0, "<eos>": 1, **{c: i + 2 for i, c in enumerate("abcdefghijklmnopqrstuvwxyz \n")}}
    vocabulary |= {f"<{n}>": len(vocabulary) + n for n in range(fillers)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"bos_token": "<bos>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, **({"eos_token": "<eos>"} if eos else {}))


def texts(n: int = 120) -> list[str]:
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list("abcdefghij "), size=length)) for length in rng.integers(1, 30, size=n)]


def tokenise(corpus: list[str], folder: Path, **options: Any) -> TokenizedCorpus:
    tokenizer = options.pop("tokenizer", None) or character_tokenizer()
    shares = {"selection_share": 0.2, "evaluation_share": 0.2}
    return tokenize_corpus(ListCorpus(corpus), tokenizer, ("folder", "main"), CONTEXT, folder, **(shares | options))


def tokenised_elsewhere(folder: Path, rows: list[list[int]], **options: Any) -> TokenizedCorpus:
    path = folder / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    corpus = JsonLinesCorpus([str(path)], tokens=TokenColumns())
    tokenizer = options.pop("tokenizer", None) or character_tokenizer()
    shares = {"selection_share": 0.0, "evaluation_share": 0.0}
    return tokenize_corpus(corpus, tokenizer, ("folder", "main"), CONTEXT, folder / "cache", **(shares | options))


def rows_by_hand(corpus: list[str], bos: int | None, eos: int | None) -> dict[str, list[list[tuple[int, int]]]]:
    """One token at a time: `(token, document)` of every row of every split."""
    rows: dict[str, list[list[tuple[int, int]]]] = {split: [[]] for split in SPLITS}
    for document, text in enumerate(corpus):
        u = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
        split = rows["selection" if u < 0.2 else "evaluation" if u < 0.4 else "train"]
        letters = ["abcdefghijklmnopqrstuvwxyz \n".index(c) + 2 for c in text]
        for token in [*([] if bos is None else [bos]), *letters, *([eos] if bos is None and eos is not None else [])]:
            if len(split[-1]) == CONTEXT:
                split.append([] if bos is None or token == bos else [(bos, document)])
            split[-1].append((token, document))
    return {split: [row for row in all_rows if len(row) == CONTEXT] for split, all_rows in rows.items()}


@pytest.mark.parametrize(
    ("bos", "eos"), [(True, True), (False, True), (False, False)], ids=["BOS", "only EOS", "neither"]
)
@pytest.mark.parametrize("batch", [1, 50, 1 << 21], ids=lambda n: f"{n} characters at once")
def test_rows_are_packed_as_documented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bos: bool, eos: bool, batch: int
) -> None:
    monkeypatch.setattr(tokens_module, "_BATCH_CHARACTERS", batch)
    monkeypatch.setattr(packing, "_WRITE_ROWS", 7)
    got = tokenise(texts(), tmp_path, tokenizer=character_tokenizer(bos, eos))
    expected = rows_by_hand(texts(), 0 if bos else None, 1 if eos else None)
    for split in SPLITS:
        rows: TokenRows = getattr(got, split)
        tokens, documents = np.moveaxis(np.array(expected[split]), 2, 0)
        np.testing.assert_array_equal(rows.tokens, tokens)
        np.testing.assert_array_equal(rows.documents, documents)
        assert rows.bos_token_id == (0 if bos else None)
        assert rows.tokens.dtype == np.uint16
    assert got.context_size == CONTEXT
    assert got.tokenizer == ("folder", "main")
    assert got.folder == tmp_path / got.hash


def test_splits_share_no_text_even_when_documents_repeat(tmp_path: Path) -> None:
    corpus = texts() * 2
    got = tokenise(corpus, tmp_path)
    seen = [{corpus[d] for d in np.unique(getattr(got, split).documents)} for split in SPLITS]
    assert all(seen)
    assert len(set.union(*seen)) == sum(map(len, seen))


def test_a_second_call_only_opens_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tokenise(texts(), tmp_path)
    monkeypatch.setattr(ListCorpus, "documents", lambda self: pytest.fail("read again"))
    second = tokenise(texts(), tmp_path)
    assert second.hash == first.hash
    assert isinstance(second.train.tokens, np.memmap)


def test_two_calls_write_equal_bytes(tmp_path: Path) -> None:
    first, second = tokenise(texts(), tmp_path / "a"), tokenise(texts(), tmp_path / "b")
    names = sorted(path.name for path in first.folder.iterdir())
    assert names == sorted(["tokens.json", *(f"{s}.{kind}.npy" for s in SPLITS for kind in ("tokens", "documents"))])
    for name in names:
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 500},
        {"selection_share": 0.3},
        {"tokenizer": character_tokenizer(bos=False)},
        {"tokenizer": character_tokenizer(fillers=1)},
    ],
    ids=["cap", "shares", "BOS", "vocabulary"],
)
def test_what_the_rows_depend_on_is_in_their_hash(tmp_path: Path, options: dict[str, Any]) -> None:
    assert tokenise(texts(), tmp_path, **options).hash != tokenise(texts(), tmp_path).hash
    assert tokenise(texts(119), tmp_path).hash != tokenise(texts(), tmp_path).hash


def test_padding_used_in_between_does_not_change_a_tokenizers_hash() -> None:
    tokenizer = character_tokenizer()
    before = tokenizer_hash(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    padded = tokenizer_hash(tokenizer)
    tokenizer(["ab", "a"], padding=True, truncation=True, max_length=4)
    assert tokenizer_hash(tokenizer) == padded == before


def test_a_cap_counts_tokens_of_text(tmp_path: Path) -> None:
    got = tokenise(texts(), tmp_path, max_tokens=501)
    splits = json.loads((got.folder / "tokens.json").read_text())["splits"]
    assert sum(split["tokens"] for split in splits.values()) == 501


def test_a_large_vocabulary_is_kept_in_int32(tmp_path: Path) -> None:
    got = tokenise(texts(), tmp_path, tokenizer=character_tokenizer(fillers=1 << 16))
    assert got.train.tokens.dtype == np.int32


def test_a_long_document_is_tokenised_in_pieces_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "_PIECE_CHARACTERS", 10)
    text = "abcd\n\nefghijklmnopqrstuvwxyz\nab\n" + "c" * 35
    assert all(len(piece) <= 10 for piece in tokens_module._pieces(text))
    got = tokenise([text], tmp_path, selection_share=0.0, evaluation_share=0.0)
    tokens = got.train.tokens[got.train.usable()]
    assert text.startswith("".join(character_tokenizer().convert_ids_to_tokens(tokens.tolist())))
    assert len(tokens) > len(text) - CONTEXT


def test_a_split_without_a_share_is_empty(tmp_path: Path) -> None:
    got = tokenise(texts(), tmp_path, selection_share=0.0)
    assert got.selection.tokens.shape == (0, CONTEXT)
    assert usable_counts(got.selection).shape == (0,)


def test_a_corpus_too_short_says_how_many_tokens_it_has(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"too short: 10 tokens were found.*for train and selection and evaluation"):
        tokenise(["abcde", "fghij"], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"selection_share": 0.9}, "selection_share 0.9 and evaluation_share 0.2"),
        ({"evaluation_share": -0.1}, "must be 0 or more"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenise(texts(), tmp_path, **options)


def test_of_two_processes_that_race_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = tokens_module._write

    def overtaken(folder: Path, *arguments: Any) -> None:
        write(folder, *arguments)
        monkeypatch.setattr(tokens_module, "_write", write)
        tokenise(texts(), tmp_path)

    monkeypatch.setattr(tokens_module, "_write", overtaken)
    got = tokenise(texts(), tmp_path)
    assert list(tmp_path.iterdir()) == [got.folder]
    assert len(got.train.tokens) == len(rows_by_hand(texts(), 0, 1)["train"])


def test_bos_is_not_usable_even_as_id_zero() -> None:
    tokens = np.array([[0, 3, 4], [0, 5, 0]], dtype=np.uint16)
    documents = np.zeros((2, 3), dtype=np.int32)
    rows = TokenRows(tokens, documents, bos_token_id=0)
    np.testing.assert_array_equal(rows.usable(), [[False, True, True], [False, True, False]])
    np.testing.assert_array_equal(rows.usable(slice(1, 2)), [[False, True, False]])
    assert TokenRows(tokens, documents, bos_token_id=None).usable().all()


def test_usable_positions_are_counted_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_COUNT_ROWS", 3)
    rows = tokenise(texts(), tmp_path).train
    np.testing.assert_array_equal(usable_counts(rows), rows.usable().sum(axis=1))


def with_own_bos(bos: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer with a BOS, which puts it before every text by itself, or does not."""
    tokenizer = character_tokenizer()
    if bos is not None:
        template = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
        tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


@pytest.mark.parametrize(
    ("setting", "tokenizer", "expected"),
    [
        ("always", with_own_bos(None), 0),
        ("always", with_own_bos("<bos>"), 0),
        ("always", character_tokenizer(bos=False), None),
        ("tokenizer", with_own_bos(None), None),
        ("tokenizer", with_own_bos("<bos>"), 0),
        ("tokenizer", character_tokenizer(bos=False), None),
        ("never", with_own_bos("<bos>"), None),
    ],
)
def test_bos_is_put_where_it_is_asked_for(
    tmp_path: Path, setting: Any, tokenizer: PreTrainedTokenizerFast, expected: int | None
) -> None:
    got = tokenise(texts(), tmp_path, tokenizer=tokenizer, settings=RowSettings(bos=setting))
    assert got.train.bos_token_id == expected
    tokens = np.asarray(got.train.tokens)
    assert (tokens[:, 0] == 0).all() == (expected == 0)
    assert (tokens == 1).any() == (expected is None)  # without BOS, EOS ends each document


def test_bos_with_id_zero_is_a_bos(tmp_path: Path) -> None:
    """SAELens #724 takes BOS id 0 for unset, which hits every Pythia series."""
    tokenizer = character_tokenizer()
    assert tokenizer.bos_token_id == 0
    rows = tokenise(texts(), tmp_path, tokenizer=tokenizer).train
    assert rows.bos_token_id == 0
    assert rows.tokens[:, 0].tolist() == [0] * len(rows.tokens)
    assert not rows.usable()[:, 0].any()
    assert rows.left_out_shares()["bos"] == (np.asarray(rows.tokens) == 0).mean() > 1 / CONTEXT


@pytest.mark.parametrize(("leave_out", "left_out"), [(True, (1,)), (False, ())], ids=["left out", "kept"])
def test_special_tokens_can_be_left_out(tmp_path: Path, leave_out: bool, left_out: tuple[int, ...]) -> None:
    tokenizer = character_tokenizer(bos=False)
    rows = tokenise(texts(), tmp_path, tokenizer=tokenizer, settings=RowSettings(leave_out_special=leave_out)).train
    assert rows.left_out == left_out
    tokens = np.asarray(rows.tokens)
    np.testing.assert_array_equal(rows.usable(), tokens != 1 if leave_out else np.ones_like(tokens, dtype=bool))
    np.testing.assert_array_equal(usable_counts(rows), rows.usable().sum(axis=1))
    shares = {"bos": 0.0, "special": (tokens == 1).mean() if leave_out else 0.0, "padding": 0.0}
    assert rows.left_out_shares() == shares
    assert rows.select(np.array([2, 1])).left_out == left_out


def separate_by_hand(corpus: list[str]) -> list[tuple[list[int], list[int]]]:
    rows = []
    for document, text in enumerate(corpus):
        letters = ["abcdefghijklmnopqrstuvwxyz \n".index(c) + 2 for c in text]
        while letters:
            part, letters = letters[: CONTEXT - 1], letters[CONTEXT - 1 :]
            fill = CONTEXT - 1 - len(part)
            rows.append(([0, *part, *[1] * fill], [document] * (len(part) + 1) + [-1] * fill))
    return rows


def test_separate_rows_hold_one_document_and_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_WRITE_ROWS", 7)
    options = {"selection_share": 0.0, "evaluation_share": 0.0, "settings": RowSettings(layout="separate")}
    rows = tokenise(texts(), tmp_path, **options).train
    tokens, documents = (np.array(part) for part in zip(*separate_by_hand(texts()), strict=True))
    np.testing.assert_array_equal(rows.tokens, tokens)
    np.testing.assert_array_equal(rows.documents, documents)
    np.testing.assert_array_equal(rows.usable(), (tokens != 0) & (documents >= 0))
    np.testing.assert_array_equal(usable_counts(rows), rows.usable().sum(axis=1))
    np.testing.assert_array_equal(rows.predicting(), rows.usable()[:, :-1] & rows.usable()[:, 1:])
    assert rows.contexts(slice(None)) is None  # what stands before a token is of its own document
    assert rows.left_out_shares() == {
        "bos": (tokens == 0).mean(),
        "special": 0.0,
        "padding": pytest.approx((documents < 0).mean()),
    }


def test_masked_rows_are_the_packed_ones(tmp_path: Path) -> None:
    packed, masked = (tokenise(texts(), tmp_path, settings=RowSettings(layout=x)) for x in ("packed", "masked"))
    assert packed.hash == masked.hash
    some = np.array([3, 1])
    np.testing.assert_array_equal(masked.train.contexts(some), packed.train.documents[some])
    assert packed.train.contexts(some) is None
    ends = np.asarray(packed.train.documents[:, 1:] != packed.train.documents[:, :-1])
    np.testing.assert_array_equal(masked.train.predicting(), packed.train.predicting() & ~ends)
    assert (packed.train.predicting() & ends).any()


@pytest.mark.parametrize(
    ("bos", "rows", "expected"),
    [
        ("always", [[2, 3, 4], [5, 6]], [0, 2, 3, 4, 0, 5, 6]),
        ("always", [[0, 2, 3, 4], [0, 5, 6]], [0, 2, 3, 4, 0, 5, 6]),
        ("always", [[0, 2, 3, 0, 4], [5, 6]], [0, 2, 3, 0, 4, 0, 5, 6]),
        ("never", [[0, 2, 3, 0, 4], [5, 6]], [0, 2, 3, 0, 4, 5, 6]),
    ],
    ids=["BOS is put before", "BOS is there", "BOS is within", "as it is"],
)
def test_tokens_made_elsewhere_are_packed_alike(
    tmp_path: Path, bos: Any, rows: list[list[int]], expected: list[int]
) -> None:
    filler = [[7] * 9]
    got = tokenised_elsewhere(tmp_path, rows + filler, settings=RowSettings(bos=bos))
    assert np.asarray(got.train.tokens).ravel()[: len(expected)].tolist() == expected
    assert not (np.asarray(got.train.tokens) == 1).any()


def test_text_and_its_tokens_give_the_same_rows_in_other_splits(tmp_path: Path) -> None:
    shares = {"selection_share": 0.0, "evaluation_share": 0.0}
    ids = [["abcdefghijklmnopqrstuvwxyz \n".index(c) + 2 for c in text] for text in texts()]
    got, expected = tokenised_elsewhere(tmp_path, ids), tokenise(texts(), tmp_path, **shares)
    np.testing.assert_array_equal(got.train.tokens, expected.train.tokens)
    np.testing.assert_array_equal(got.train.documents, expected.train.documents)
    split = tokenised_elsewhere(tmp_path, ids + ids, selection_share=0.3, evaluation_share=0.3)
    seen = [{tuple(ids[d % len(ids)]) for d in np.unique(getattr(split, name).documents)} for name in SPLITS]
    assert all(seen)
    assert len(set.union(*seen)) == sum(map(len, seen))  # equal documents land together


@pytest.mark.parametrize(
    ("rows", "vocab_size", "message"),
    [
        (
            [[5] * 20, [6, 40]],
            40,
            r"ids\.jsonl, line 2 holds the token id 40, .* has 40 ids.*`data\.corpus`",
        ),
        ([[5] * 20, [6, 30]], None, r"line 2 holds the token id 30, .* vocabulary has 30 ids"),
        ([[5, -100, 6], [5] * 20], 40, r"line 1 holds the token id -100, .* vocabulary has 40 ids"),
    ],
    ids=["beyond", "beyond the tokenizer", "negative"],
)
def test_an_id_that_the_llm_does_not_know_is_named(
    tmp_path: Path, rows: list[list[int]], vocab_size: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        tokenised_elsewhere(tmp_path, rows, vocab_size=vocab_size)
    assert "\n" not in str(raised.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_text_and_cached_rows_are_held_against_the_vocabulary_too(tmp_path: Path) -> None:
    corpus = [" ", *texts()]  # the blank is the last of the ids, 28
    known = tokenise(corpus, tmp_path, vocab_size=30)
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(ValueError, match=r"Document 0 of the corpus .* token id 28, .* vocabulary has 28 ids"):
            tokenise(corpus, folder, vocab_size=28)
    assert tokenise(corpus, tmp_path, vocab_size=29).hash == known.hash


def test_ids_beyond_the_tokenizer_are_kept_where_the_llm_knows_them(tmp_path: Path) -> None:
    got = tokenised_elsewhere(tmp_path, [[5] * 20, [70_000] * 20], vocab_size=100_000)
    assert got.train.tokens.dtype == np.int32
    assert got.train.tokens.max() == 70_000
