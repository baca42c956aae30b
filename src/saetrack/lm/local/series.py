"""A folder of local LLM checkpoints in the order of their steps."""

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from saetrack.lm import files
from saetrack.lm.checkpoints import CheckpointSource, LLMCheckpoint
from saetrack.lm.local.formats import LocalFormat
from saetrack.lm.names import parse_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Facts:
    """What a checkpoint itself says of its place in the training; None where it does not."""

    step: int | None
    tokens: int | None = None


class LocalSource(CheckpointSource):
    """A folder with one checkpoint for every file or folder in it, none of them in Hugging Face's format.

    The step is what the checkpoint says of itself, or else what its name says. A file whose name says no step and that
    is of the same step as another, such as ``last.ckpt``, is left out as a copy.

    Args:
        path: The folder.
        format: How one of them is read.
        tokenizer: Folder or repository of the tokenizer; by default the one in ``path``.
    """

    def __init__(self, path: str | Path, format: LocalFormat, tokenizer: str | None) -> None:
        self.path = Path(path)
        self.format = format
        self._tokenizer = tokenizer

    @abstractmethod
    def candidates(self) -> list[Path]:
        """The files or folders in ``path`` that are checkpoints by their look.

        Raises:
            FileNotFoundError: If there are none.
        """

    @abstractmethod
    def facts(self, path: Path) -> Facts:
        """What a checkpoint says of itself.

        Raises:
            ValueError: If it cannot be read.
        """

    def checkpoints(self) -> list[LLMCheckpoint]:
        """The checkpoints in the order of their steps.

        Raises:
            FileNotFoundError: If the folder does not exist or holds none.
            ValueError: If two are of one step, or one says no step, neither in itself nor by its name.
        """
        if not self.path.is_dir():
            raise FileNotFoundError(
                f"{self.path} is not a folder. Give the one that holds the LLM checkpoints as `path`."
            )
        by_step: dict[int, Path] = {}
        tokens: dict[int, int | None] = {}
        # those with a number in their names first, so that what is left out is the copy
        for path in sorted(self.candidates(), key=lambda path: (parse_name(path.name) is None, path.name)):
            facts = self._placed(path)
            assert facts.step is not None
            if facts.step not in by_step:
                by_step[facts.step], tokens[facts.step] = path, facts.tokens
            elif parse_name(path.name) is not None:
                raise ValueError(
                    f"{self.path}: {by_step[facts.step].name} and {path.name} are both LLM checkpoints of step "
                    f"{facts.step}. Move one of them elsewhere."
                )
            else:
                logger.info("%s is of step %d, as %s is; leaving it out.", path, facts.step, by_step[facts.step].name)
        return [LLMCheckpoint(str(by_step[s]), None, s, tokens[s], format=self.format) for s in sorted(by_step)]

    def _placed(self, path: Path) -> Facts:
        named = parse_name(path.name)
        try:
            facts = self.facts(path)
        except ValueError:
            if named is None:
                raise
            facts = Facts(None)  # listed all the same, and the audit says what is wrong with it
        if facts.step is not None:
            return facts
        if named is None:
            raise ValueError(f"{path} says no step, neither in itself nor by its name. Call it step1000{path.suffix}.")
        return Facts(named.step)

    @property
    def tokenizer_name(self) -> tuple[str, str | None]:
        """The tokenizer that was given, or the one in the folder.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is a pickle.
        """
        name = self._tokenizer or str(self.path)
        if files.is_folder(name) and files.has_tokenizer(name, None):
            return name, None
        pickled = Path(name) if name.endswith(".pkl") else Path(name, "meta.pkl")
        if name.endswith(".pkl") or pickled.is_file():
            raise ValueError(
                f"{pickled} is a pickle, which is not opened. Write its characters into a tokenizer.json, as "
                f"docs/local-series.md shows, and name its folder as the source's `tokenizer`."
            )
        if self._tokenizer is None:
            raise FileNotFoundError(
                f"The LLM checkpoints in {self.path} come without a tokenizer. Name its folder or repository as the "
                f"source's `tokenizer`, such as gpt2."
            )
        return name, None


def found_in(folder: Path, chosen: Sequence[Path], expected: str) -> list[Path]:
    """The checkpoints that were found, or an error that says what is there instead."""
    if chosen:
        return list(chosen)
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
    raise FileNotFoundError(f"{folder} holds no LLM checkpoints: expected {expected}, found {there}. Check `path`.")
