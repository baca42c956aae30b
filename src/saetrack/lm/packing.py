"""Documents written as rows of tokens, one split at a time."""

from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

_WRITE_ROWS = 4096


class SplitWriter:
    """Packs documents into rows and writes them to the two files of one split as they fill up.

    Args:
        folder: Where the files go.
        split: Which they begin their names with.
        context_size: Tokens in a row.
        dtype: Of the tokens.
        bos_token_id: Begins every row and document; None for nothing.
        pad_token_id: Fills what a document leaves of its row, as document -1; None puts the next document there.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        context_size: int,
        dtype: str,
        bos_token_id: int | None,
        pad_token_id: int | None,
    ) -> None:
        self.rows = 0
        self.documents = 0
        self.tokens = 0  # of text, BOS not counted, the dropped rest included
        self._context_size = context_size
        self._bos = bos_token_id
        self._pad = pad_token_id
        self._arrays = {"tokens": np.dtype(dtype), "documents": np.dtype(np.int32)}
        self._files: dict[str, BinaryIO] = {n: (folder / f"{split}.{n}.npy").open("wb") for n in self._arrays}
        self._blocks = {n: np.empty((_WRITE_ROWS, context_size), dtype) for n, dtype in self._arrays.items()}
        self._row = self._column = 0  # where the next token goes in the blocks
        self._write_headers()

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def add(self, tokens: npt.NDArray[Any], document: int) -> None:
        """Write the tokens of a document."""
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
        if self._pad is not None and self._column:
            self._put(np.full(self._context_size - self._column, self._pad), -1)

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
        """Write what is left of whole rows; the rest of the last one is dropped."""
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
