"""Where text comes from: the standard library's own source and text files here, data sets in `saetrack.lm.tables`.

A corpus is an ordered series of documents that reads the same every time. Its `identity` changes when its text does, so
that tokens made from it can be kept on disk (see `saetrack.lm.tokens`).
"""

import glob
import hashlib
import json
import platform
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}
_READ_CHARACTERS = 1 << 22
_READ_BYTES = 1 << 22


class Corpus(ABC):
    """An ordered series of documents that reads the same every time."""

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """Read the documents, one at a time, always in the same order.

        Yields:
            The text of a document, never empty.
        """

    @property
    @abstractmethod
    def identity(self) -> str:
        """A json object that says what the corpus is, and changes when its text does."""


@dataclass(frozen=True)
class StdlibCorpus(Corpus):
    """The source text of the running Python's standard library, one document a file (about 31 MB with its tests).

    Real text that is on every machine. Files are read in the order of their paths; the few that are not UTF-8 (they
    test Python's own decoder) are left out. What a distribution leaves out of its Python (Debian: the tests) is
    not there.
    """

    def documents(self) -> Iterator[str]:
        """Read the modules of the standard library in the order of their paths."""
        for path in self._files:
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if text:
                yield text

    @cached_property
    def identity(self) -> str:
        """Python's version and a hash of all the source files."""
        return json.dumps(
            {"class": "StdlibCorpus", "python": platform.python_version(), **content_facts(self._files, self._root)}
        )

    @cached_property
    def _root(self) -> Path:
        # In a virtual environment too, this names the library of the Python that the environment was made from.
        return Path(sysconfig.get_path("stdlib"))

    @cached_property
    def _files(self) -> list[Path]:
        found = [path for path in self._root.rglob("*.py") if path.is_file()]
        found = [path for path in found if _NOT_STDLIB.isdisjoint(path.relative_to(self._root).parts)]
        if not found:
            raise FileNotFoundError(
                f"No *.py files of Python's standard library were found in {self._root}. Name a corpus of your own, "
                f"for example `--corpus TextCorpus --corpus.paths '[\"texts/*.txt\"]'`."
            )
        return sorted(found, key=lambda path: path.relative_to(self._root).as_posix())


@dataclass(frozen=True)
class TextCorpus(Corpus):
    r"""UTF-8 text files, in the order of their paths.

    Args:
        paths: File names or glob patterns; ``**`` goes into folders. A file that several patterns match is read once.
        separator: What stands between two documents of a file, for example ``<|endoftext|>``. Without it every file is
            one document. Blank documents are skipped. A file should hold many documents rather than
            be a huge one: the corpus is split by document into training, selection and evaluation.

    Raises:
        FileNotFoundError: When read, if a pattern matches no file.
        ValueError: If ``separator`` is empty; when read, if a file is not UTF-8.
    """

    paths: list[str]
    separator: str | None = None

    def __post_init__(self) -> None:
        if self.separator == "":
            raise ValueError("TextCorpus.separator is empty; give the text between two documents, or leave it out.")

    def documents(self) -> Iterator[str]:
        """Read the documents of every file in the order of the files' paths."""
        for path in self._files:
            yield from self._split(path)

    def _split(self, path: Path) -> Iterator[str]:
        rest = ""
        try:
            with path.open(encoding="utf-8") as file:
                while read := file.read(_READ_CHARACTERS if self.separator else -1):
                    *whole, rest = (rest + read).split(self.separator) if self.separator else [read]
                    yield from (text for text in whole if text.strip())
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Convert it, or narrow `corpus.paths`, "
                f"which is {self.paths}."
            ) from error
        if rest.strip():
            yield rest

    @cached_property
    def identity(self) -> str:
        """The separator and a hash of the files' contents in their order; where the files lie does not count."""
        return json.dumps({"class": "TextCorpus", "separator": self.separator, **content_facts(self._files, None)})

    @cached_property
    def _files(self) -> list[Path]:
        return find_files(self.paths)


def find_files(patterns: list[str]) -> list[Path]:
    """The files that names and glob patterns match, each once, in the order of their paths.

    Raises:
        FileNotFoundError: If a pattern matches no file, or there is none.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matched = [Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file()]
        if not matched:
            raise FileNotFoundError(
                f"corpus.paths: {pattern!r} matches no file (looked from {Path.cwd()}). Give a file name or a "
                f"pattern such as 'texts/**/*.txt'."
            )
        found.update(matched)
    if not found:
        raise FileNotFoundError("corpus.paths is empty; give at least one file name or pattern.")
    return sorted(found)


def content_facts(files: Iterable[Path], root: Path | None) -> dict[str, Any]:
    """Number, size and hash of files, in this order. Their names count relative to `root`; without it, not at all."""
    digest = hashlib.sha256()
    number = size = 0
    for path in files:
        name = "" if root is None else path.relative_to(root).as_posix()
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while read := file.read(_READ_BYTES):
                digest.update(read)
                size += len(read)
        number += 1
    return {"files": number, "bytes": size, "sha256": digest.hexdigest()}
