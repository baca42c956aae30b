"""What corpora have in common whose documents are rows of a table: as text, or as tokens that are there already."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from saetrack.lm.corpus import Corpus


@dataclass(frozen=True)
class TokenColumns:
    """The columns of a data set that was tokenised elsewhere, with the tokenizer of the LLM.

    Without ``doc_ids`` a row is one document, or several where BOS stands between them. The ids are taken as they are,
    but packed anew: a document gets a BOS where it has none (unless ``data.tokens.bos`` is never).
    """

    input_ids: str = "input_ids"
    """Column of the token ids, a list of integers in each row."""
    attention_mask: str | None = None
    """Column with as many numbers: 0 where a token is padding, which is left out."""
    doc_ids: str | None = None
    """Column with as many numbers: where they change, another document begins."""
    across_rows: bool = False
    """Whether ``doc_ids`` count through the whole data set, so that a document goes on in the next row where that
    begins with the same number. Otherwise a row ends its last document."""

    @property
    def names(self) -> list[str]:
        """The columns to read."""
        return [name for name in (self.input_ids, self.attention_mask, self.doc_ids) if name is not None]


class TokenDocument(NamedTuple):
    """A document as token ids.

    Attributes:
        tokens: Shape ``[n]``, int64, not empty.
        place: The row it begins in, for messages.
    """

    tokens: npt.NDArray[np.int64]
    place: str


class TableCorpus(Corpus, ABC):
    """A corpus whose documents are rows with named columns.

    Subclasses have the attributes ``column``, which names the column of the text, and ``tokens``, which names those of
    the token ids where it is not None; ``column`` is then not read.
    """

    column: str
    tokens: TokenColumns | None

    @abstractmethod
    def records(self, columns: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Read the rows in their order.

        Args:
            columns: What to read of each.

        Yields:
            Where the row is, for messages, and its values. Lists may be NumPy arrays.

        Raises:
            ValueError: If a row cannot be read or a column is missing.
        """

    def documents(self) -> Iterator[str]:
        """Read the text of the rows in their order; rows without text are skipped.

        Raises:
            ValueError: If the corpus holds token ids, or a value is no text.
        """
        if self.tokens is not None:
            raise ValueError(
                "corpus.tokens is set, so this corpus gives token ids and no text, which a tokenizer is trained on. "
                "Leave it out and name the column of the text as `corpus.column`."
            )
        for place, record in self.records([self.column]):
            text = record[self.column]
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"{place}: column {self.column!r} is {brief(text)}, but expected text. Name another one as "
                    "`corpus.column`, or the columns of token ids as `corpus.tokens`."
                )
            if text:
                yield text

    def token_documents(self, separator: int | None) -> Iterator[TokenDocument]:
        """Read the token ids of the documents in their order; padding is left out.

        Args:
            separator: The token that begins a document, where no ``doc_ids`` say it; None where none does.

        Raises:
            ValueError: If a row holds no list of ids, or its columns are of different lengths.
        """
        assert self.tokens is not None
        if self.tokens.across_rows and self.tokens.doc_ids is None:
            raise ValueError(
                "corpus.tokens.across_rows is true, but only `doc_ids` say where documents go on; name their column."
            )
        pending, pending_id = TokenDocument(np.empty(0, dtype=np.int64), ""), None
        for place, record in self.records(self.tokens.names):
            ids, documents = _row(self.tokens, place, record)
            if not len(ids):
                continue
            starts = ids == separator if documents is None else np.diff(documents, prepend=documents[:1]) != 0
            parts = np.split(ids, np.flatnonzero(starts))
            if self.tokens.across_rows and documents is not None and documents[0] == pending_id:
                pending = TokenDocument(np.concatenate([pending.tokens, parts.pop(0)]), pending.place)
            for part in parts:
                if len(pending.tokens):
                    yield pending
                pending = TokenDocument(part, place)
            if documents is not None:
                pending_id = documents[-1]
        if len(pending.tokens):
            yield pending

    def facts(self) -> dict[str, Any]:
        """What is read of each row, for `identity`."""
        return {"column": self.column} if self.tokens is None else {"tokens": asdict(self.tokens)}


def require_columns(record: Mapping[str, Any], columns: list[str], place: str) -> Mapping[str, Any]:
    """The record, which has the columns.

    Raises:
        ValueError: If it lacks one; the message begins with ``place`` and lists those it has.
    """
    for column in columns:
        if column not in record:
            raise ValueError(
                f"{place} has no column {column!r}; it has {sorted(record)}. Name one as `corpus.column`, or as "
                "`corpus.tokens.input_ids` where it holds token ids."
            )
    return record


def arrow_rows(batch: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of an arrow table or batch; lists of numbers as arrays, the rest as Python values."""
    import pyarrow as pa

    values, is_fixed = [], pa.types.is_fixed_size_list
    for name in columns:
        column = batch.column(name)
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or is_fixed(column.type):
            values.append([v.values.to_numpy(zero_copy_only=False) if v.is_valid else None for v in column])
        else:
            values.append(column.to_pylist())
    for row in zip(*values, strict=True):
        yield dict(zip(columns, row, strict=True))


def _row(
    columns: TokenColumns, place: str, record: Mapping[str, Any]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
    """Token ids of a row without its padding, and the number of the document of each where that is known."""
    arrays = {name: _integers(record[name], place, name) for name in columns.names}
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{place}: its columns are of different lengths, {lengths}; each needs a number a token.")
    kept = slice(None) if columns.attention_mask is None else arrays[columns.attention_mask] != 0
    documents = None if columns.doc_ids is None else arrays[columns.doc_ids][kept]
    return arrays[columns.input_ids][kept], documents


def _integers(value: Any, place: str, name: str) -> npt.NDArray[np.int64]:
    is_list = isinstance(value, list | np.ndarray)
    array = np.asarray(value if is_list else 0)
    if is_list and array.size == 0:
        return np.empty(0, dtype=np.int64)
    if not is_list or array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_):
        raise ValueError(
            f"{place}: column {name!r} is {brief(value)}, but expected a list of integers. Name another one in "
            "`corpus.tokens`, or the column of the text as `corpus.column` without `corpus.tokens`."
        )
    return array.astype(np.int64)


def brief(value: Any) -> str:
    """A value as a message shows it."""
    shown = repr(value.tolist() if isinstance(value, np.ndarray) else value)
    return f"{shown[:40]}..." if len(shown) > 40 else shown
