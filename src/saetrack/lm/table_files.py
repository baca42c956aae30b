"""Corpora in json lines and parquet files on this disk."""

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from saetrack.errors import first_line
from saetrack.lm.corpus import content_facts, find_files
from saetrack.lm.tables import TableCorpus, TokenColumns, arrow_rows, brief, require_columns

_READ_ROWS = 1024


@dataclass(frozen=True)
class JsonLinesCorpus(TableCorpus):
    """Files with a json object in every line, in the order of their paths; one document a line.

    Args:
        paths: File names or glob patterns; ``**`` goes into folders. Names that end in .gz, .bz2 or .xz are unpacked.
        column: The field that holds the text. Blank lines and empty texts are skipped.
        tokens: The fields that hold token ids, where the text is tokenised already.

    Raises:
        FileNotFoundError: When read, if a pattern matches no file.
        ValueError: When read, if a line is no json object or lacks the field; file and line are named.
    """

    paths: list[str]
    column: str = "text"
    tokens: TokenColumns | None = None

    def records(self, columns: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Read the lines of every file."""
        for path in find_files(self.paths):
            if path.suffix == ".zst":
                raise ValueError(f"{path} is packed with zstd, which is not read here; unpack it with `zstd -d` first.")
            try:
                with _open(path) as file:
                    for number, line in enumerate(file, start=1):
                        if line.strip():
                            place = f"{path}, line {number}"
                            yield place, require_columns(_json_object(line, place), columns, place)
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise ValueError(f"{path} cannot be read ({error}). Fetch or write it again.") from error

    @cached_property
    def identity(self) -> str:
        """The fields and a hash of the files' contents in their order; where the files lie does not count."""
        files = content_facts(find_files(self.paths), None)
        return json.dumps({"class": "JsonLinesCorpus", **self.facts(), **files})


@dataclass(frozen=True)
class ParquetCorpus(TableCorpus):
    """Parquet files, in the order of their paths; one document a row.

    Args:
        paths: File names or glob patterns; ``**`` goes into folders.
        column: The column that holds the text. Empty texts are skipped.
        tokens: The columns that hold token ids, where the text is tokenised already.

    Raises:
        FileNotFoundError: When read, if a pattern matches no file.
        ValueError: When read, if a file is not parquet or lacks the column.
    """

    paths: list[str]
    column: str = "text"
    tokens: TokenColumns | None = None

    def records(self, columns: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Read the rows of every file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        for path in find_files(self.paths):
            row = 0
            try:
                with pq.ParquetFile(path) as file:
                    require_columns(dict.fromkeys(file.schema_arrow.names), columns, str(path))
                    for batch in file.iter_batches(_READ_ROWS, columns=columns):
                        for record in arrow_rows(batch, columns):
                            yield f"{path}, row {row} (the first is 0)", record
                            row += 1
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{path} cannot be read as parquet ({first_line(error)}.). Write it again.") from error

    @cached_property
    def identity(self) -> str:
        """The columns and a hash of the files' contents in their order; where the files lie does not count."""
        files = content_facts(find_files(self.paths), None)
        return json.dumps({"class": "ParquetCorpus", **self.facts(), **files})


def _json_object(line: bytes, place: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is no json ({first_line(error)}.). Correct or delete the line.") from error
    if not isinstance(value, dict):
        raise ValueError(f'{place} is {brief(value)}, but expected a json object such as {{"text": ...}}.')
    return value


def _open(path: Path) -> IO[bytes]:
    """The content of a file, unpacked if its name says that it is packed."""
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    opened: IO[bytes] = openers.get(path.suffix, open)(path, "rb")
    return opened
