"""What every series of LLM checkpoints can do, wherever it lies."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from saetrack.lm import files
from saetrack.lm.hub_listing import label
from saetrack.lm.loading import LLMCheckpoint
from saetrack.lm.watching import Watcher
from saetrack.pickles import reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class CheckpointSource(ABC):
    """Where a series of LLM checkpoints comes from."""

    watcher: Watcher | None = None
    """Looks at a series that is still being written; None where all of it is there."""

    def prepare(self) -> None:
        """Make the checkpoints exist, or wait for the first of a series that is watched. Called by one process."""
        if self.watcher is not None:
            self.watcher.wait()

    @abstractmethod
    def checkpoints(self) -> list[LLMCheckpoint]:
        """The series, with strictly increasing steps. Reads names only, no weights."""

    def left_out(self) -> list[str]:
        """Names beside the checkpoints' that say no step, for the user to see; they are in no series."""
        return []

    @property
    @abstractmethod
    def tokenizer_name(self) -> tuple[str, str | None]:
        """Folder or repository, and revision, of the one tokenizer of the whole series."""

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer that ``tokenizer_name`` pins."""
        return self._load_tokenizer(None)

    def _load_tokenizer(self, cache_dir: str | None) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        name, revision = self.tokenizer_name
        where = label(name, revision)
        try:
            return AutoTokenizer.from_pretrained(
                files.fetch_tokenizer(name, revision, cache_dir), trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            if files.has_tokenizer(name, revision, cache_dir):
                raise ValueError(
                    f"The tokenizer in {where} cannot be read ({reason(error)}): its files, or the config.json beside "
                    "them, are damaged or could not be downloaded. Restore them, or name another folder as `tokenizer` "
                    "of the checkpoint source."
                ) from error
            raise FileNotFoundError(
                f"There is no tokenizer in {where}. Name a folder or a repository that has one "
                f"as `tokenizer` (or `tokenizer_revision`) of the checkpoint source."
            ) from error


def pinned_tokenizer(series: Sequence[LLMCheckpoint]) -> tuple[str, str | None] | None:
    """The tokenizer of the last checkpoint that has one; None where none has."""
    for checkpoint in reversed(series):
        if files.has_tokenizer(checkpoint.model, checkpoint.revision, checkpoint.cache_dir):
            return checkpoint.model, checkpoint.revision
    return None
