"""How a command says what is wrong: in one line, where argparse prints a page of usage and Python a traceback."""

from __future__ import annotations

import errno
import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Any, ClassVar, NoReturn

PACKAGE = Path(__file__).parent
TRACEBACK_VARIABLE = "SAETRACK_TRACEBACK"

_FULL = (errno.ENOSPC, errno.EDQUOT)
_SECONDS_TO_END = 10.0
"""Within which a process that has failed is gone."""
_STARTED_BY = os.getppid()

_KEY = r'Parser key "(?P<key>[^"]*)"'
_MISSING = re.compile(rf"{_KEY}: Not of type .* not NoneType")
_NO_CLASS = re.compile(r'(?:Parser )?key "(?P<key>[^"]*)".*?Expected a dot import path string: (?P<value>\S+)')
_NO_IMPORT = re.compile(rf"{_KEY}.*?Problem with given class_path '(?P<value>[^']*)': (?P<why>.*?)(?: - | Given |$)")
_UNION = re.compile(
    rf"{_KEY}:.* Union subtypes Subtypes: \[(?P<type>.*?)\] Errors: .* Given value: (?P<value>(?:(?! Given value).)*)$"
)
_TYPE = re.compile(rf"{_KEY}: Expected an? (?P<type>.*?)\. Got value: (?P<value>.*)$")
_LIST = re.compile(r"list(\[(?P<item>.*?)\])?")
_NUMBERS = re.compile(r"-?\d+(, *-?\d+)*")
_TYPE_NAME = re.compile(r"<class '(?:[^']*\.)?(\w+)'>|typing\.Literal\[([^]]*)\]|(?:\w+\.)+(\w+)")


def first_line(error: BaseException) -> str:
    """What an error says, without the lines that follow and without its full stop; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


class OneLineErrors:
    """Mixin for an argument parser."""

    prog: str
    command: ClassVar[str] = "fit"
    """The command that runs: the parser of a class among its values has another name, and does not know it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what was wrong and where to read on, and exit with 2.

        Args:
            message: What the parser found; its line breaks are dropped.
            ex: The error that it comes from, which the message contains.
        """
        found = in_plain_words(" ".join(message.split()).rstrip("."))
        whole = self.prog == "saetrack" and "unrecognized arguments" in found
        program = "saetrack" if whole else f"saetrack {self.command}"
        listing = "saetrack analyses" if "analyses" in found.split(" ")[0] else f"{program} --help"
        sys.stderr.write(f"{program}: error: {found}. `{listing}` lists what there is.\n")
        sys.exit(2)

    def instantiate(self, *args: Any, **options: Any) -> Any:
        """Make the objects that were asked for.

        Raises:
            ValueError: What a class of ours says of its arguments, as it says it; where a value may be of several
                types, jsonargparse raises an error of its own from that of the first.
        """
        try:
            return super().instantiate(*args, **options)  # type: ignore[misc]
        except ValueError as error:
            own: BaseException | None = error
            while own is not None and not is_ours(own):
                own = own.__cause__
            if own is None or own is error:
                raise
            raise own from own.__cause__


def in_plain_words(found: str) -> str:
    """What jsonargparse finds wrong, with the value first and in the words of a configuration.

    Example:
        >>> in_plain_words('''Parser key "model.lr": Expected a <class 'float'>. Got value: fast''')
        'model.lr is fast; expected float'
        >>> in_plain_words('''Parser key "hookpoints": Expected a <class 'list'>. Got value: layers.0''')
        'hookpoints is layers.0; expected a list, which is written [layers.0]'
        >>> in_plain_words('Parser key "positions": Expected a list[int]. Got value: [1.5]')
        'positions is [1.5]; expected a list of int, such as [0, 3]'
    """
    if missing := _MISSING.search(found):
        return f"{missing['key']} is missing. Begin with a configuration, such as --config configs/quickstart.yaml"
    if no_class := _NO_CLASS.search(found):
        return f"{no_class['key']}: there is no class {no_class['value']!r}"
    if no_import := _NO_IMPORT.search(found):
        return f"{no_import['key']}: {no_import['value']} cannot be used: {no_import['why']}"
    if wrong := _UNION.search(found) or _TYPE.search(found):
        types = _TYPE_NAME.sub(lambda name: next(filter(None, name.groups())), wrong["type"])
        expected = types.replace("NoneType", "null")
        if a_list := _LIST.match(expected):
            expected = _list_for(wrong["value"], a_list["item"])
        return f"{wrong['key']} is {wrong['value']}; expected {expected}"
    return re.sub(rf"^{_KEY}", r"\g<key>", found)


def _list_for(value: str, item: str | None) -> str:
    """What list was expected where a value was given: the value as a list, if its items could be of their type."""
    if not value.startswith("[") and (item != "int" or _NUMBERS.fullmatch(value)):
        return f"a list, which is written [{value.strip(', ')}]"
    return f"a list of {item}, such as [0, 3]" if item == "int" else f"a list of {item or 'values'}"


def one_line(error: BaseException) -> str | None:
    """What a user should read of an error in place of its traceback; None where the traceback is what there is to say.

    A line is enough for what a check of ours found, and for the file system's own errors.
    """
    ours = is_ours(error)
    full = error.errno in _FULL if isinstance(error, OSError) else f"(os error {errno.ENOSPC})" in str(error)
    if full and not ours:
        return "The disk is full. What is finished is whole: make room, then go on (`fit` with `--ckpt_path last`)."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}. Give another place, or make this one readable and writable."
    return str(error) if ours else None


def wants_traceback(error: BaseException) -> bool:
    """Whether a line is not enough for an error, or the user asks for more."""
    return bool(os.environ.get(TRACEBACK_VARIABLE)) or one_line(error) is None


def is_ours(error: BaseException) -> bool:
    """Whether a check of this package raised it, with a message that is made to be read.

    What a library's compiled code raises ends in a frame of ours too, but not at a ``raise``.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return (
        isinstance(error, ValueError | OSError | RuntimeError)
        and bool(frames)
        and Path(frames[-1].filename).is_relative_to(PACKAGE)
        and (frames[-1].line or "raise").startswith("raise")
    )


def said_by_rank_zero() -> bool:
    """Whether this process is one of several, and the one that started it has failed too and has said why.

    When only this one fails, rank zero waits for it in vain and is ended by Lightning: then it is for this one to say.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        return False
    deadline = time.monotonic() + _SECONDS_TO_END
    while os.getppid() == _STARTED_BY and time.monotonic() < deadline:
        time.sleep(0.05)
    return os.getppid() != _STARTED_BY
