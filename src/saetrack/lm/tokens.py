"""Documents as packed rows of tokens, made once for a whole series of LLM checkpoints and memory-mapped from then on.

A row looks like `[BOS, t, t, BOS, t, t, t, ...]`: every row begins with BOS, and so does every document in it. LLMs
that have no BOS get rows without it; there the tokenizer's EOS, where it has one, ends each document.

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
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from saetrack.lm.corpus import Corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SPLITS = ("train", "selection", "evaluation")
_SCHEMA = 1  # of the files; part of their hash, so that older ones are made anew
_BATCH_CHARACTERS = 1 << 21  # tokenised at once: an encoding in memory is about 50 times its text
_PIECE_CHARACTERS = 1 << 20  # a longer document is tokenised in pieces cut at line ends
_WRITE_ROWS = 4096
_COUNT_ROWS = 1 << 14


@dataclass(frozen=True)
class TokenRows:
    """Packed rows of one split.

    Args:
        tokens: Token ids, shape ``[rows, context]``, uint16 or int32, usually memory-mapped.
        documents: Which document of the corpus each token is from, shape ``[rows, context]``, int32. A BOS belongs to
            the document of the token after it.
        bos_token_id: The id of BOS, or None where the LLM has none. 0 is an id.
    """

    tokens: npt.NDArray[Any]
    documents: npt.NDArray[np.int32]
    bos_token_id: int | None

    def usable(self, rows: slice | npt.NDArray[Any] = slice(None)) -> npt.NDArray[np.bool_]:
        """Positions whose activations count: all but BOS, whose activations are outliers of a norm of their own.

        Args:
            rows: Which rows to look at; all by default, which for a large split needs memory for all of them.

        Returns:
            Mask, shape ``[rows, context]``.
        """
        tokens = self.tokens[rows]
        if self.bos_token_id is None:
            return np.ones(tokens.shape, dtype=np.bool_)
        return np.asarray(tokens != self.bos_token_id)


def usable_counts(rows: TokenRows) -> npt.NDArray[np.int64]:
    """Number of usable positions of every row, counted in blocks so that a memory-mapped split stays on disk.

    Returns:
        Counts, shape ``[rows]``.

    Example:
        >>> tokens = np.array([[0, 5, 6], [0, 7, 0]], dtype=np.uint16)
        >>> usable_counts(TokenRows(tokens, np.zeros((2, 3), dtype=np.int32), bos_token_id=0))
        array([2, 1])
    """
    counts = np.zeros(len(rows.tokens), dtype=np.int64)
    for start in range(0, len(counts), _COUNT_ROWS):
        block = slice(start, start + _COUNT_ROWS)
        counts[block] = rows.usable(block).sum(axis=1)
    return counts


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
) -> TokenizedCorpus:
    """Tokenise a corpus into packed rows on disk, or open what an earlier call has written.

    A document goes to the split that the hash of its text names, so equal documents land together and the splits share
    no text. Special tokens come only from here, never from the tokenizer. What remains of a split after its last whole
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

    Raises:
        ValueError: If the arguments make no sense, or the corpus has too little text to fill one row of each split.
    """
    shares = {"selection": selection_share, "evaluation": evaluation_share}
    _check(context_size, max_tokens, shares)
    key = _key(corpus, source_tokenizer, context_size, max_tokens, shares)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_dir / name
    if not folder.is_dir():
        cache_dir.mkdir(parents=True, exist_ok=True)
        unfinished = cache_dir / f".{name}-{os.getpid()}-{secrets.token_hex(4)}"
        unfinished.mkdir()
        try:
            _write(unfinished, corpus, source_tokenizer, key)
            _rename(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return _open(folder, tokenizer_name, context_size)


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
) -> dict[str, Any]:
    """Everything that the files depend on."""
    return {
        "schema": _SCHEMA,
        "corpus": json.loads(corpus.identity),
        "tokenizer": tokenizer_hash(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "dtype": "uint16" if len(tokenizer) < 1 << 16 else "int32",
        "context_size": context_size,
        "max_tokens": max_tokens,
        "shares": shares,
    }


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of what a tokenizer does to text; neither its name nor the padding it was last used with counts."""
    if tokenizer.is_fast:
        facts = json.loads(tokenizer.backend_tokenizer.to_str())
        facts |= {"truncation": None, "padding": None}
    else:
        facts = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class _SplitWriter:
    """Packs documents into rows and writes them to the two files of one split as they fill up."""

    def __init__(self, folder: Path, split: str, context_size: int, dtype: str, bos_token_id: int | None) -> None:
        self.rows = 0
        self.documents = 0
        self.tokens = 0  # of text, BOS not counted, the dropped rest included
        self._context_size = context_size
        self._bos = bos_token_id
        self._arrays = {"tokens": np.dtype(dtype), "documents": np.dtype(np.int32)}
        self._files: dict[str, BinaryIO] = {n: (folder / f"{split}.{n}.npy").open("wb") for n in self._arrays}
        self._blocks = {n: np.empty((_WRITE_ROWS, context_size), dtype) for n, dtype in self._arrays.items()}
        self._row = self._column = 0  # where the next token goes in the blocks
        self._write_headers()

    def __enter__(self) -> "_SplitWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def add(self, tokens: npt.NDArray[Any], document: int) -> None:
        self.documents += 1
        self.tokens += len(tokens)
        at = 0
        if self._bos is not None:
            self._put(np.array([self._bos]), document)
        while at < len(tokens):
            if self._column == 0 and self._bos is not None:
                self._put(np.array([self._bos]), document)
            part = tokens[at : at + self._context_size - self._column]
            self._put(part, document)
            at += len(part)

    def _put(self, tokens: npt.NDArray[Any], document: int) -> None:
        """Write tokens that fit into the present row."""
        end = self._column + len(tokens)
        self._blocks["tokens"][self._row, self._column : end] = tokens
        self._blocks["documents"][self._row, self._column : end] = document
        self._column = end
        if self._column == self._context_size:
            self._row, self._column = self._row + 1, 0
            if self._row == _WRITE_ROWS:
                self._flush()

    def _flush(self) -> None:
        for name, file in self._files.items():
            file.write(self._blocks[name][: self._row].tobytes())
        self.rows += self._row
        self._row = 0

    def finish(self) -> None:
        self._flush()
        self._write_headers()

    def _write_headers(self) -> None:
        """Numpy's header leaves room for the number of rows to grow, so the final one fits over the first."""
        for name, file in self._files.items():
            file.seek(0)
            np.lib.format.write_array_header_1_0(
                file,
                {
                    "descr": np.lib.format.dtype_to_descr(self._arrays[name]),
                    "fortran_order": False,
                    "shape": (self.rows, self._context_size),
                },
            )


def _write(folder: Path, corpus: Corpus, tokenizer: "PreTrainedTokenizerBase", key: dict[str, Any]) -> None:
    context_size, max_tokens, bos = key["context_size"], key["max_tokens"], key["bos_token_id"]
    arguments = (context_size, key["dtype"], bos)
    logger.info("Tokenising %s into rows of %d tokens.", type(corpus).__name__, context_size)
    with (
        _SplitWriter(folder, "train", *arguments) as train,
        _SplitWriter(folder, "selection", *arguments) as selection,
        _SplitWriter(folder, "evaluation", *arguments) as evaluation,
    ):
        writers = {"train": train, "selection": selection, "evaluation": evaluation}
        read = 0
        for document, (text, tokens) in enumerate(_tokenized(corpus, tokenizer)):
            kept = tokens if max_tokens is None else tokens[: max_tokens - read]
            read += len(kept)
            if len(kept):
                writers[_split_of(text, key["shares"])].add(kept, document)
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
            f"row of {context_size} tokens for {' and '.join(empty)}. Give more text or more documents, a smaller "
            f"`context_size`" + (", or a larger `max_tokens`." if max_tokens is not None else ".")
        )
    (folder / "tokens.json").write_text(json.dumps({**key, "splits": facts}, indent=2) + "\n", encoding="utf-8")


def _split_of(text: str, shares: dict[str, float]) -> str:
    number = int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
    uniform = number / 2**64
    if uniform < shares["selection"]:
        return "selection"
    return "evaluation" if uniform < shares["selection"] + shares["evaluation"] else "train"


def _tokenized(corpus: Corpus, tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Documents and their tokens, many tokenised at once because a fast tokenizer then uses every core."""
    batch: list[str] = []
    size = 0
    for text in corpus.documents():
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield from _tokenized_batch(batch, tokenizer)
            batch, size = [], 0
    if batch:
        yield from _tokenized_batch(batch, tokenizer)


def _tokenized_batch(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[str, npt.NDArray[Any]]]:
    ends = [tokenizer.eos_token_id] if tokenizer.bos_token_id is None and tokenizer.eos_token_id is not None else []
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


def _open(folder: Path, tokenizer: tuple[str, str | None], context_size: int) -> TokenizedCorpus:
    facts = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    splits = {
        split: TokenRows(
            tokens=np.load(folder / f"{split}.tokens.npy", mmap_mode="r"),
            documents=np.load(folder / f"{split}.documents.npy", mmap_mode="r"),
            bos_token_id=facts["bos_token_id"],
        )
        for split in _SPLITS
    }
    return TokenizedCorpus(folder=folder, context_size=context_size, hash=folder.name, tokenizer=tokenizer, **splits)
