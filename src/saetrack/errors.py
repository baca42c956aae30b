"""Errors in one line: what a library's says, and what was typed wrong, where argparse prints a page of usage."""

from __future__ import annotations

import os
import re
import sys
import traceback
from pathlib import Path
from typing import NoReturn

PACKAGE = Path(__file__).parent
TRACEBACK_VARIABLE = "SAETRACK_TRACEBACK"

_NO_CLASS = re.compile(r'(?:Parser )?key "([^"]*)".*?Expected a dot import path string: (\S+)')


def first_line(error: BaseException) -> str:
    """What an error says, without the lines that follow and without its full stop; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


class OneLineErrors:
    """Mixin for an argument parser."""

    prog: str

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what was wrong and where to read on, and exit with 2.

        Args:
            message: What the parser found; its line breaks are dropped.
            ex: The error that it comes from, which the message contains.
        """
        found = " ".join(message.split()).rstrip(".")
        if (no_class := _NO_CLASS.search(found)) is not None:
            found = f"{no_class[1]}: there is no class {no_class[2]!r}"
        program = self.prog.replace(" [options]", "")
        listing = "saetrack analyses" if "analyses" in found else f"{program} --help"
        sys.stderr.write(f"{program}: error: {found}. `{listing}` lists what there is.\n")
        sys.exit(2)


def wants_traceback(error: BaseException) -> bool:
    """Whether an error's message is not enough: no check of ours raised it, nor the file system, or it is asked for."""
    if os.environ.get(TRACEBACK_VARIABLE):
        return True
    if isinstance(error, OSError) and error.filename is not None:
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    return not Path(last.filename).is_relative_to(PACKAGE)
