"""A series of LLM checkpoints that is still being written: which of them are complete, and when it has ended."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from saetrack.errors import first_line
from saetrack.lm import files
from saetrack.lm.hub_listing import ask_for_files
from saetrack.lm.loading import LLMCheckpoint
from saetrack.lm.weight_files import damage, weight_names

DONE = "done"
"""Name of the file that ends a series."""


@dataclass(frozen=True)
class Watch:
    """How a series that is still being written is followed.

    Args:
        until_step: The LLM's training step that ends the series; later LLM checkpoints are left out. By default it
            ends when there is a file ``done`` in the folder, or on ``main`` of the repository.
        every_seconds: Seconds between two looks.
    """

    until_step: int | None = None
    every_seconds: float = 10.0

    def __post_init__(self) -> None:
        if not self.every_seconds > 0:
            raise ValueError(f"watch.every_seconds is {self.every_seconds}; it must be above 0.")


@dataclass(frozen=True)
class Growing:
    """What there is of a series at one moment.

    Args:
        series: Its complete LLM checkpoints, by increasing step, up to the first that is not.
        ended: Whether there will be no more.
        unfinished: Why the one after them is not complete; None where there is none.
    """

    series: list[LLMCheckpoint]
    ended: bool
    unfinished: str | None = None


class Watcher:
    """Looks at a series again and again. One that was complete once is not read again while it is there.

    Args:
        where: The folder or the repository, for what is said.
        watch: How.
        list_all: Gives every LLM checkpoint that has a name, complete or not, by increasing step.
        is_done: Whether the file ``done`` is there.
    """

    def __init__(
        self, where: str, watch: Watch, list_all: Callable[[], Sequence[LLMCheckpoint]], is_done: Callable[[], bool]
    ) -> None:
        self.where = where
        self._watch = watch
        self._list_all = list_all
        self._is_done = is_done
        self._complete: dict[tuple[str, str | None], LLMCheckpoint] = {}

    def wait(
        self,
        more_than: int = 0,
        look: Callable[[], Growing] | None = None,
        between: Callable[[], None] = lambda: None,
        say: Callable[[str], object] = lambda line: sys.stderr.write(f"{line}\n"),
    ) -> Growing:
        """Wait until the series has more complete LLM checkpoints, or has ended.

        Args:
            more_than: How many it has already.
            look: In place of ``look``, where several processes must see the same.
            between: Called several times in a second; what it raises ends the waiting.
            say: Is given a line before the first pause, and another when the reason for waiting changes.
        """
        said = ""
        while len((now := (look or self.look)()).series) <= more_than and not now.ended:
            if (line := self._reason(now)) != said:
                say(said := line)
            until = time.monotonic() + self._watch.every_seconds
            while (left := until - time.monotonic()) > 0:
                between()
                time.sleep(min(left, 0.2))
        return now

    def _reason(self, now: Growing) -> str:
        last = f"after step {now.series[-1].step} " if now.series else ""
        end = "" if self._watch.until_step is None else f"at step {self._watch.until_step} or "
        partly = f" The next one is not complete: {now.unfinished}." if now.unfinished else ""
        return (
            f"Waiting for an LLM checkpoint {last}in {self.where}, with a look every {self._watch.every_seconds:g} s; "
            f"the series ends {end}with a file `{DONE}` there.{partly}"
        )

    def so_far(self) -> list[LLMCheckpoint]:
        """The complete LLM checkpoints.

        Raises:
            FileNotFoundError: If there is none yet.
        """
        now = self.look()
        if not now.series:
            why = f" ({now.unfinished})" if now.unfinished else ""
            raise FileNotFoundError(f"{self.where} holds no complete LLM checkpoint{why}. `fit` waits for one.")
        return now.series

    def look(self) -> Growing:
        """What there is now.

        A series that has ended is given whole: what is not complete in it never will be, and the audit says so.
        """
        done = self._is_done()  # asked first: whatever was written before it is in the list
        found = list(self._list_all())
        until = self._watch.until_step
        within = [checkpoint for checkpoint in found if until is None or checkpoint.step <= until]
        if done:
            return Growing(within, ended=True)
        there = {(checkpoint.model, checkpoint.revision) for checkpoint in found}
        self._complete = {name: known for name, known in self._complete.items() if name in there}
        series: list[LLMCheckpoint] = []
        for checkpoint in within:
            name = (checkpoint.model, checkpoint.revision)
            if name not in self._complete:
                if (fault := unfinished(checkpoint)) is not None:
                    return Growing(series, ended=False, unfinished=fault)
                self._complete[name] = checkpoint
            series.append(self._complete[name])
        passed = until is not None and any(checkpoint.step >= until for checkpoint in found)
        return Growing(series, ended=passed)


def unfinished(checkpoint: LLMCheckpoint) -> str | None:
    """Why an LLM checkpoint cannot be read yet, in a few words; None when it is complete.

    It is complete with its configuration, and with weights of which every shard in the index is there and as long as
    its header says.
    """
    try:
        if files.is_folder(checkpoint.model):
            return _unfinished_folder(Path(checkpoint.model))
        remote = ask_for_files(checkpoint.model, checkpoint.revision)
        files.weights_on_hub(checkpoint.model, checkpoint.revision, remote, checkpoint.cache_dir)
        return None if "config.json" in remote.sha256 else f"{checkpoint} has no config.json"
    except (OSError, ValueError) as error:
        return first_line(error)


def _unfinished_folder(folder: Path) -> str | None:
    for name in ("config.json", "trainer_state.json"):
        if (folder / name).is_file() and not _is_json(folder / name):
            return f"{folder / name} is not whole"
    if not (folder / "config.json").is_file():
        return f"{folder} has no config.json"
    cut = next((name for name in weight_names(folder) if damage(folder / name) is not None), None)
    return None if cut is None else f"{folder / cut} is not whole"


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True
