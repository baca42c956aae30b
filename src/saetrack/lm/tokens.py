"""Documents as packed rows of tokens, made once for a whole series of LLM checkpoints and memory-mapped from then on.

A row looks like `[BOS, t, t, BOS, t, t, t, ...]`: every row begins with BOS, and so does every document in it. LLMs
that have no BOS get rows without it; there the tokenizer's EOS, where it has one, ends each document. `RowSettings`
says what else a row can be.

The folder of a tokenised corpus is named by a hash of everything that its content depends on and holds, for each of the
splits training, selection and evaluation, `SPLIT.tokens.npy` and `SPLIT.documents.npy`, and beside them `tokens.json`.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from saetrack.lm.corpus import Corpus
from saetrack.lm.packing import SplitWriter
from saetrack.lm.rows import Layout, RowSettings, TokenRows, usable_counts
from saetrack.lm.tables import TableCorpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RowSettings", "TokenRows", "TokenizedCorpus", "tokenize_corpus", "tokenizer_hash", "usable_counts"]

logger = logging.getLogger(__name__)

_SPLITS = ("train", "selection", "evaluation")
_SCHEMA = 1  # of the files; part of their hash, so that older ones are made anew
_BATCH_CHARACTERS = 1 << 21  # tokenised at once: an encoding in memory is about 50 times its text
_PIECE_CHARACTERS = 1 << 20  # a longer document is tokenised in pieces cut at line ends


@dataclass(frozen=True)
class TokenizedCorpus:
    """A corpus as token rows in three splits that share no document.

    Args:
        folder: Where the files lie.
        train: Rows that train the SAEs (and the LLM, when it is pretrained here).
        selection: Rows for choosing: top contexts, thresholds.
        evaluation: Rows for measuring.
        context_size: Tokens in a row, BOS included.
        hash: Names everything that the rows depend on: corpus, tokenizer, context size, shares, cap.
        tokenizer: Repository or folder of the tokenizer, and its revision.
    """

    folder: Path
    train: TokenRows
    selection: TokenRows
    evaluation: TokenRows
    context_size: int
    hash: str
    tokenizer: tuple[str, str | None]


def tokenize_corpus(
    corpus: Corpus,
    source_tokenizer: "PreTrainedTokenizerBase",
    tokenizer_name: tuple[str, str | None],
    context_size: int,
    cache_dir: Path,
    max_tokens: int | None = None,
    selection_share: float = 0.05,
    evaluation_share: float = 0.05,
    settings: RowSettings = RowSettings(),
    vocab_size: int | None = None,
) -> TokenizedCorpus:
    """Tokenise a corpus into packed rows on disk, or open what an earlier call has written.

    A document goes to the split that the hash of its text (or of its token ids, where it comes as such) names, so
    equal documents land together and the splits share no text. Special tokens come only from here, never from the
    tokenizer. What remains of a split after its last whole
    row is dropped. The files are written into a folder with another name which is then renamed: killed runs leave
    nothing that looks complete, and of several processes that race the first to finish wins (their files are equal).

    Args:
        corpus: The documents.
        source_tokenizer: The tokenizer of the whole series.
        tokenizer_name: Its repository or folder, and revision; recorded, not read.
        context_size: Tokens in a row, BOS included.
        cache_dir: Folder that holds one folder for each tokenised corpus.
        max_tokens: Read no more of the corpus than this many tokens of text (all splits together; BOS not counted).
        selection_share: Share of the documents for selection, from 0 to 1. 0 leaves the split empty.
        evaluation_share: The same for evaluation.
        settings: What a row holds beside the text.
        vocab_size: Ids that the LLM knows; None does not look.

    Raises:
        ValueError: If the arguments make no sense, the corpus has too little text to fill one row of each split, or a
            token id that the LLM does not know.
    """
    shares = {"selection": selection_share, "evaluation": evaluation_share}
    _check(context_size, max_tokens, shares)
    key = _key(corpus, source_tokenizer, context_size, max_tokens, shares, settings, vocab_size)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_dir / name
    if not folder.is_dir():
        cache_dir.mkdir(parents=True, exist_ok=True)
        unfinished = cache_dir / f".{name}-{os.getpid()}-{secrets.token_hex(4)}"
        unfinished.mkdir()
        try:
            _write(unfinished, corpus, source_tokenizer, key, vocab_size)
            _rename(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    left_out = settings.left_out(source_tokenizer)
    return _open(folder, tokenizer_name, context_size, vocab_size, left_out, settings.layout)


def _check(context_size: int, max_tokens: int | None, shares: dict[str, float]) -> None:
    if context_size < 2:
        raise ValueError(f"context_size is {context_size}; a row needs at least 2 tokens, of which BOS is one.")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; give at least 1, or null to read the whole corpus.")
    if min(shares.values()) < 0 or sum(shares.values()) >= 1:
        raise ValueError(
            f"selection_share {shares['selection']} and evaluation_share {shares['evaluation']} must be 0 or more and "
            f"leave something for training (their sum must be below 1)."
        )


def _key(
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase",
    context_size: int,
    max_tokens: int | None,
    shares: dict[str, float],
    settings: RowSettings,
    vocab_size: int | None,
) -> dict[str, Any]:
    """Everything that the files depend on."""
    known = len(tokenizer)
    if _token_table(corpus) is not None:  # such ids may lie beyond the tokenizer's, where the LLM has room for them
        known = vocab_size or known
    padding = {}
    if settings.layout == "separate":
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, 0)
        padding = {"pad_token_id": next(i for i in ids if i is not None)}
    return {
        "schema": _SCHEMA,
        "corpus": json.loads(corpus.identity),
        "tokenizer": tokenizer_hash(tokenizer),
        "bos_token_id": settings.bos_token_id(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "dtype": "uint16" if known < 1 << 16 else "int32",
        "context_size": context_size,
        "max_tokens": max_tokens,
        "shares": shares,
        **padding,
    }


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of what a tokenizer does to text; neither its name nor the padding it was last used with counts."""
    if tokenizer.is_fast:
        facts = json.loads(tokenizer.backend_tokenizer.to_str())
        facts |= {"truncation": None, "padding": None}
    else:
        facts = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class _Document(NamedTuple):
    """A document on its way into a split.

    Attributes:
        content: What names its split.
        tokens: Its token ids, ``[n]``.
        place: Where it comes from, for messages; None for a text, which its number names.
    """

    content: bytes
    tokens: npt.NDArray[Any]
    place: str | None


def _write(
    folder: Path, corpus: Corpus, tokenizer: "PreTrainedTokenizerBase", key: dict[str, Any], vocab_size: int | None
) -> None:
    max_tokens, bos = key["max_tokens"], key["bos_token_id"]
    arguments = (key["context_size"], key["dtype"], bos, key.get("pad_token_id"))
    logger.info("Tokenising %s into rows of %d tokens.", type(corpus).__name__, key["context_size"])
    largest, where = -1, ""
    known = vocab_size if _token_table(corpus) is None else vocab_size or len(tokenizer)
    with (
        SplitWriter(folder, "train", *arguments) as train,
        SplitWriter(folder, "selection", *arguments) as selection,
        SplitWriter(folder, "evaluation", *arguments) as evaluation,
    ):
        writers = {"train": train, "selection": selection, "evaluation": evaluation}
        read = 0
        for number, document in enumerate(_documents(corpus, tokenizer, bos)):
            kept = document.tokens if max_tokens is None else document.tokens[: max_tokens - read]
            read += len(kept)
            if len(kept):
                place = document.place or f"Document {number} of the corpus (the first is 0)"
                _refuse_unknown(int(kept.min()), place, known)
                if (top := int(kept.max())) > largest:
                    largest, where = top, place
                    _refuse_unknown(largest, where, known)
                writers[_split_of(document.content, key["shares"])].add(kept, number)
            if read == max_tokens:
                break
        for writer in writers.values():
            writer.finish()
    facts = {
        split: {"rows": writer.rows, "documents": writer.documents, "tokens": writer.tokens}
        for split, writer in writers.items()
    }
    empty = [split for split, writer in writers.items() if writer.rows == 0 and key["shares"].get(split) != 0]
    if empty:
        found = ", ".join(f"{facts[s]['tokens']} tokens of {facts[s]['documents']} documents for {s}" for s in _SPLITS)
        raise ValueError(
            f"The corpus is too short: {read} tokens were found, which split by document gave {found}, and no whole "
            f"row of {key['context_size']} tokens for {' and '.join(empty)}. Give more text or more documents, a "
            f"smaller `context_size`" + (", or a larger `max_tokens`." if max_tokens is not None else ".")
        )
    note = {**key, "splits": facts, "largest_token": {"token": largest, "place": where}}
    (folder / "tokens.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")


def _refuse_unknown(token: int, place: str, vocab_size: int | None) -> None:
    if token < 0 or (vocab_size is not None and token >= vocab_size):
        raise ValueError(
            f"{place} holds the token id {token}, which the LLM does not know: its vocabulary has {vocab_size} ids, of "
            "which 0 is the first. Correct `data.corpus`, or the tokenizer of `data.source`: both must be this LLM's."
        )


def _split_of(content: bytes, shares: dict[str, float]) -> str:
    number = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
    uniform = number / 2**64
    if uniform < shares["selection"]:
        return "selection"
    return "evaluation" if uniform < shares["selection"] + shares["evaluation"] else "train"


def _token_table(corpus: Corpus) -> TableCorpus | None:
    """The corpus, if it holds token ids instead of text."""
    return corpus if isinstance(corpus, TableCorpus) and corpus.tokens is not None else None


def _documents(corpus: Corpus, tokenizer: "PreTrainedTokenizerBase", bos: int | None) -> Iterator[_Document]:
    """Documents as token ids without BOS, which the rows get where they need it."""
    if (table := _token_table(corpus)) is None:
        ends = [tokenizer.eos_token_id] if bos is None and tokenizer.eos_token_id is not None else []
        for text, tokens in _tokenized(corpus, tokenizer, ends):
            yield _Document(text.encode("utf-8", "surrogatepass"), tokens, None)
        return
    for document in table.token_documents(bos):
        tokens = document.tokens[int(document.tokens[0] == bos) :]
        yield _Document(tokens.tobytes(), tokens, document.place)


def _tokenized(
    corpus: Corpus, tokenizer: "PreTrainedTokenizerBase", ends: list[int]
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Documents and their tokens, many tokenised at once because a fast tokenizer then uses every core."""
    batch: list[str] = []
    size = 0
    for text in corpus.documents():
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield from _tokenized_batch(batch, tokenizer, ends)
            batch, size = [], 0
    if batch:
        yield from _tokenized_batch(batch, tokenizer, ends)


def _tokenized_batch(
    texts: list[str], tokenizer: "PreTrainedTokenizerBase", ends: list[int]
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    pieces = [list(_pieces(text)) for text in texts]
    encoded = iter(
        tokenizer(
            [piece for document in pieces for piece in document],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
    )
    for text, document in zip(texts, pieces, strict=True):
        tokens = [np.asarray(next(encoded), dtype=np.int32) for _ in document]
        yield text, np.concatenate([*tokens, np.asarray(ends, dtype=np.int32)])


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        newline = text.rfind("\n", start + 1, start + _PIECE_CHARACTERS)
        end = newline if newline > start else start + _PIECE_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]


def _rename(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        logger.info("Another process has written %s in the meantime; using that.", folder)


def _open(
    folder: Path,
    tokenizer: tuple[str, str | None],
    context_size: int,
    vocab_size: int | None,
    left_out: tuple[int, ...],
    layout: Layout,
) -> TokenizedCorpus:
    facts = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    if "largest_token" in facts:  # made for another LLM, perhaps; 0.1.0 did not note it
        _refuse_unknown(**facts["largest_token"], vocab_size=vocab_size)
    splits = {
        split: TokenRows(
            tokens=np.load(folder / f"{split}.tokens.npy", mmap_mode="r"),
            documents=np.load(folder / f"{split}.documents.npy", mmap_mode="r"),
            bos_token_id=facts["bos_token_id"],
            left_out=left_out,
            layout=layout,
        )
        for split in _SPLITS
    }
    return TokenizedCorpus(folder=folder, context_size=context_size, hash=folder.name, tokenizer=tokenizer, **splits)
