"""Corpora that `datasets` reads: from the Hub, from a folder, from a saved data set, or as a stream."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from saetrack.errors import first_line
from saetrack.lm.corpus import content_facts, find_files
from saetrack.lm.tables import TableCorpus, TokenColumns, arrow_rows, require_columns

_READ_ROWS = 1024
_SHUFFLED_ROWS = 10_000


@dataclass(frozen=True)
class DatasetCorpus(TableCorpus):
    """A `datasets` data set, one document a row.

    Args:
        path: A data set of the Hugging Face Hub, a folder of data files (json lines, csv, parquet, text), or a folder
            that `save_to_disk` wrote; with ``data_files`` also one of the formats json, csv, parquet and text.
        name: The data set's configuration, where it has several.
        split: Which split of it to read.
        column: The column that holds the text.
        streaming: Read it without keeping a copy on disk, and no more of it than ``data.tokens.max_tokens``. Not for a
            folder that `save_to_disk` wrote.
        revision: Commit, branch or tag on the Hub. Give it when ``streaming``: a data set that changed there is
            otherwise not noticed, and tokens made from the old text go on being used.
        data_files: Which of its files to read: names or patterns in the data set, or on this disk.
        shuffle_seed: Read the rows in an order drawn with this seed; when ``streaming``, the order of the files, and
            within 10,000 rows at a time. By default in the data set's own order, in which the first
            ``data.tokens.max_tokens`` may all be of one kind.
        tokens: The columns that hold token ids, where the text is tokenised already.

    Raises:
        ValueError: When read, if there is no such data set, split or column (the message lists those it has).
    """

    path: str
    name: str | None = None
    split: str = "train"
    column: str = "text"
    streaming: bool = False
    revision: str | None = None
    data_files: list[str] | None = None
    shuffle_seed: int | None = None
    tokens: TokenColumns | None = None

    def records(self, columns: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Read the rows of the split."""
        rows = self._rows
        # a stream of files without a schema tells its columns only by its first row
        known = rows.column_names if rows.column_names is not None else self._next(iter(rows))
        require_columns(dict.fromkeys(known or ()), columns, f"The data set {self.path}")
        rows = rows.select_columns(columns)
        if self.shuffle_seed is not None:
            buffer = {"buffer_size": _SHUFFLED_ROWS} if self.streaming else {}
            rows = rows.shuffle(seed=self.shuffle_seed, **buffer)
        order = f", in the order of shuffle_seed {self.shuffle_seed}" if self.shuffle_seed is not None else ""
        row = 0
        batches = rows.with_format("arrow").iter(_READ_ROWS)
        while (batch := self._next(batches)) is not None:
            for record in arrow_rows(batch, columns):
                yield f"{self.path}, row {row} (the first is 0{order})", record
                row += 1

    def _next(self, batches: Iterator[Any]) -> Any:
        with self._one_line_errors():
            return next(batches, None)

    @cached_property
    def identity(self) -> str:
        """The arguments, and what is known of the content: its size and the hashes of its files."""
        facts: dict[str, Any] = {
            "class": "DatasetCorpus",
            "path": self.path,
            "name": self.name,
            "split": self.split,
            **self.facts(),
            "revision": self.revision,
        }
        optional = {"data_files": self.data_files, "shuffle_seed": self.shuffle_seed}
        facts |= {name: value for name, value in optional.items() if value is not None}
        if self.shuffle_seed is not None:
            facts["streaming"] = self.streaming  # which shuffles otherwise
        folder = Path(self.path)
        if folder.is_dir():
            # Where the folder lies says nothing about the text in it.
            facts["path"] = folder.name
            facts |= content_facts(sorted(path for path in folder.rglob("*") if path.is_file()), folder)
        elif self._is_format:
            facts |= content_facts(find_files(self.data_files or []), None)
            del facts["data_files"]
        elif not self.streaming:
            # Hub files appear in the checksums under the commit that they were read from.
            checksums = json.dumps(self._rows.info.download_checksums, sort_keys=True, default=str)
            facts["rows"] = len(self._rows)
            facts["sha256"] = hashlib.sha256(checksums.encode()).hexdigest()
        return json.dumps(facts)

    @property
    def _is_saved(self) -> bool:
        return any((Path(self.path) / name).is_file() for name in ("state.json", "dataset_dict.json"))

    @property
    def _is_format(self) -> bool:
        """Whether ``path`` is the name of a format and the data are files on this disk."""
        return self.path in ("json", "csv", "parquet", "text") and not any("://" in f for f in self.data_files or [])

    @cached_property
    def _rows(self) -> Any:
        import datasets

        if self._is_saved:
            return self._saved_rows()
        files = self.data_files
        if self._is_format:
            files = [str(path) for path in find_files(self.data_files or [])]
        with self._one_line_errors():
            return datasets.load_dataset(
                self.path,
                self.name,
                split=self.split,
                streaming=self.streaming,
                revision=self.revision,
                data_files=files,
            )

    @contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        import datasets

        try:
            yield
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            said = first_line(error.__cause__ or error) + "."  # of a failed conversion only the cause says what it was
            raise ValueError(
                f"corpus.path {self.path!r} cannot be read as a data set: {said} Check `corpus.path`, `corpus.name`, "
                "`corpus.split` and `corpus.data_files`."
            ) from error

    def _saved_rows(self) -> Any:
        import datasets

        if self.streaming:
            raise ValueError(f"{self.path} is a saved data set and cannot be streamed; leave out `corpus.streaming`.")
        if self.data_files is not None:
            raise ValueError(f"{self.path} is a saved data set and is read whole; leave out `corpus.data_files`.")
        rows = datasets.load_from_disk(self.path)
        if isinstance(rows, datasets.DatasetDict):
            if self.split not in rows:
                raise ValueError(f"corpus.split is {self.split!r}, but {self.path} holds the splits {sorted(rows)}.")
            rows = rows[self.split]
        return rows
