"""The pages of the documentation, and the code that stands on them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "plugins").rglob("README.md"))]
_SHELL = re.compile(r"^(saetrack|make|pip|git|cd) ", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Args:
        page: The file.
        line: Line of its fence, from 1.
        info: What stands behind the fence, such as ``python title="plugins/mine.py"``.
        code: What is in it.
    """

    page: Path
    line: int
    info: str
    code: str

    @property
    def language(self) -> str:
        """``python``, ``bash``, ...; a block without one is ``bash`` when a line of it begins with a command."""
        named = self.info.split()[0] if self.info else ""
        return named or ("bash" if _SHELL.search(self.code) else "text")

    @property
    def title(self) -> str | None:
        """The file that the block is to be saved as."""
        found = re.search(r'title="([^"]+)"', self.info)
        return found[1] if found else None

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command; lines that end in a backslash go on, comments are left out."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    tokens = MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))
    return [
        Block(page, token.map[0] + 1, token.info.strip(), token.content)
        for token in tokens
        if token.type == "fence" and token.map
    ]


def inline_code(page: Path) -> Iterator[str]:
    """What stands between single backticks on a page."""
    for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
        for child in token.children or []:
            if child.type == "code_inline":
                yield " ".join(child.content.split())
