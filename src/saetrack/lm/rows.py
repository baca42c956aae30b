"""Rows of tokens: which of their positions count, and what they see of each other."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COUNT_ROWS = 1 << 14

Bos = Literal["always", "tokenizer", "never"]
Layout = Literal["packed", "masked", "separate"]


@dataclass(frozen=True)
class RowSettings:
    """What a row holds beside the text.

    Args:
        bos: Whether BOS begins every row and document: ``always`` where the tokenizer has one; ``tokenizer`` where it
            puts one before a text by itself; ``never``.
        layout: ``packed``: several documents in a row, and each sees those before it, as in most LLMs' training;
            ``masked``: the same rows, but attention and positions begin anew with each document; ``separate``: a
            document begins a row, and padding ends it.
        leave_out_special: Whether the activations of every special token of the tokenizer are left out. Those of BOS
            and padding always are.
    """

    bos: Bos = "always"
    layout: Layout = "packed"
    leave_out_special: bool = True

    def bos_token_id(self, tokenizer: "PreTrainedTokenizerBase") -> int | None:
        """The id that begins every row, None for nothing. 0 is an id, and that of Pythia's BOS."""
        bos: int | None = tokenizer.bos_token_id
        if self.bos == "tokenizer" and bos is not None:
            return bos if tokenizer("a")["input_ids"][:1] == [bos] else None
        return None if self.bos == "never" else bos

    def left_out(self, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
        """The special tokens beside BOS that are left out."""
        special = set(tokenizer.all_special_ids) if self.leave_out_special else set()
        return tuple(sorted(special - {self.bos_token_id(tokenizer)}))


@dataclass(frozen=True)
class TokenRows:
    """Rows of one split.

    Args:
        tokens: Token ids, shape ``[rows, context]``, uint16 or int32, usually memory-mapped.
        documents: Which document of the corpus each token is from, shape ``[rows, context]``, int32. A BOS belongs to
            the document of the token after it; padding is of document -1.
        bos_token_id: The id of BOS, or None where the LLM has none. 0 is an id.
        left_out: Other ids whose activations do not count.
        layout: How documents share rows, see `RowSettings`.
    """

    tokens: npt.NDArray[Any]
    documents: npt.NDArray[np.int32]
    bos_token_id: int | None
    left_out: tuple[int, ...] = ()
    layout: Layout = "packed"

    def select(self, rows: slice | npt.NDArray[Any]) -> "TokenRows":
        """Some of the rows, in memory."""
        return replace(self, tokens=np.asarray(self.tokens[rows]), documents=np.asarray(self.documents[rows]))

    def usable(self, rows: slice | npt.NDArray[Any] = slice(None)) -> npt.NDArray[np.bool_]:
        """Positions whose activations count: all but BOS, padding and the ids in `left_out`.

        Activations at BOS are outliers: where a BOS begins each row, their norm can be ten to a hundred times the
        others'.

        Args:
            rows: Which rows to look at; all by default, which for a large split needs memory for all of them.

        Returns:
            Mask, shape ``[rows, context]``.
        """
        tokens = self.tokens[rows]
        ids = [*self.left_out, *([] if self.bos_token_id is None else [self.bos_token_id])]
        usable = np.isin(tokens, ids, invert=True)
        return np.asarray(usable & ~self._padding(rows))

    def predicting(self, rows: slice | npt.NDArray[Any] = slice(None)) -> npt.NDArray[np.bool_]:
        """Positions whose prediction of the next token counts in a loss.

        Returns:
            Mask, shape ``[rows, context - 1]``: the usable positions; where documents share no context, only those
            whose next token is of the same document.
        """
        usable = self.usable(rows)[:, :-1]
        if self.layout == "packed":
            return usable
        documents = self.documents[rows]
        return np.asarray(usable & (documents[:, 1:] == documents[:, :-1]))

    def contexts(self, rows: slice | npt.NDArray[Any]) -> npt.NDArray[np.int32] | None:
        """The document numbers that attention may not cross, ``[rows, context]``; None where it may, or need not."""
        return np.asarray(self.documents[rows]) if self.layout == "masked" else None

    def left_out_shares(self) -> dict[str, float]:
        """Share of all positions that do not count, by the reason."""
        padding = self._padding(slice(None)) & np.ones(self.tokens.shape, dtype=np.bool_)
        bos = ~padding & (np.zeros_like(padding) if self.bos_token_id is None else self.tokens == self.bos_token_id)
        special = ~self.usable() & ~padding & ~bos
        return {"bos": float(bos.mean()), "special": float(special.mean()), "padding": float(padding.mean())}

    def _padding(self, rows: slice | npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        # only rows of one document have any; those of the others are not read for it
        return np.asarray(self.documents[rows] < 0) if self.layout == "separate" else np.asarray(False)


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
