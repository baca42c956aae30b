"""What long work says on the terminal: a bar where a person looks on, plain lines in a log file."""

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

_EXPECTED_WARNINGS = (
    ".*does not have many workers.*",  # the stream is a forward of the LLM in this process; workers would each load it
    ".*LeafSpec.*is deprecated.*",  # lightning's own pytree helper with torch 2.13
    "LightningCLI.s args parameter is intended to run from within Python.*",  # a control does
    ".*is smaller than the logging interval.*",  # what is logged, and when, is the module's own business
)


def quiet_lightning() -> None:
    """Silence Lightning's news about hardware, tips and defaults that are set here: they bury what a user must read."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)


class Display(ABC):
    """Shows how far one piece of work after another has come."""

    between: float
    """Seconds to leave between two calls of `show`: reading the numbers waits for the device."""

    @abstractmethod
    def begin(self, heading: str, total: int, unit: str) -> None:
        """Name the next piece of work and how much of it there is."""

    @abstractmethod
    def wait(self, text: str) -> None:
        """Say what happens while nothing can be counted."""

    @abstractmethod
    def show(self, done: int, text: str) -> None:
        """Show how much is done, and how it goes."""

    @abstractmethod
    def stop(self) -> None:
        """Leave the terminal as it was."""


class _Bar(Display):
    """A bar that fills, and a line below it that says how it goes."""

    between = 0.5

    def __init__(self, console: Console) -> None:
        self._progress = Progress(TextColumn("{task.description}"), BarColumn(None), TaskProgressColumn(), expand=True)
        self._task = self._progress.add_task("")
        self._below = Text(no_wrap=True, overflow="ellipsis")
        self._live = Live(Group(self._progress, self._below), console=console, transient=True)
        self._live.start()

    def begin(self, heading: str, total: int, unit: str) -> None:
        self._progress.reset(self._task, total=total, description=heading)
        self.wait("starting")

    def wait(self, text: str) -> None:
        self._below.plain = text

    def show(self, done: int, text: str) -> None:
        self._progress.update(self._task, completed=done)
        self._below.plain = text

    def stop(self) -> None:
        self._live.stop()


class _Lines(Display):
    """Whole lines, for what is not a terminal."""

    def __init__(self, console: Console, between: float) -> None:
        self._console = console
        self.between = between

    def begin(self, heading: str, total: int, unit: str) -> None:
        self._heading = heading
        self._console.print(f"{heading}: {total:,} {unit}", markup=False)

    def wait(self, text: str) -> None:
        """Nothing: the line of the next piece will say it."""

    def show(self, done: int, text: str) -> None:
        self._console.print(f"{self._heading}: {text}", markup=False)

    def stop(self) -> None:
        """Nothing is held."""


def plain_console() -> Console:
    """The standard error, with no colours of rich's own and no lines cut."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def show_on(console: Console, every_seconds: float) -> Display:
    """A bar on a terminal; elsewhere a line at the start of each piece of work, and one every so many seconds."""
    return _Bar(console) if console.is_terminal else _Lines(console, every_seconds)


@contextmanager
def shown(heading: str, unit: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show work that consists of pieces: what is yielded is told how many are done, of how many, and what comes next.

    Args:
        heading: What the work is.
        unit: What the pieces are.
    """
    display = show_on(plain_console(), 0.0)
    begun = False

    def show(done: int, total: int, text: str) -> None:
        nonlocal begun
        if not begun:
            display.begin(heading, total, unit)
            begun = True
        display.show(done, text)

    try:
        yield show
    finally:
        display.stop()


def duration(seconds: float) -> str:
    """A time to wait, as a person says it.

    Example:
        >>> [duration(s) for s in (0.4, 59.2, 60, 3599, 3601, 100_000)]
        ['1 s', '60 s', '1 min', '60 min', '1 h 1 min', '27 h 47 min']
    """
    if seconds < 60:
        return f"{max(1, -int(-seconds // 1))} s"
    minutes = -int(-seconds // 60)
    return f"{minutes} min" if seconds < 3600 else f"{minutes // 60} h {minutes % 60} min"
