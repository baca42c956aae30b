"""Writing files and folders whole or not at all: a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder under a hidden name, which takes its real name when everything is written into it.

    A folder that is there already is moved aside first and removed last. When the writing fails nothing of the
    new one stays, and the old one is as it was.

    Args:
        folder: The real name; its parent is made when missing.

    Yields:
        The hidden folder, empty.
    """
    new, old = (folder.with_name(f".{folder.name}{suffix}") for suffix in ("", ".old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    for path in new.rglob("*"):
        if path.is_file():
            make_readable(path)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def make_readable(path: Path) -> None:
    """Give a file the rights that others of this process have; safetensors writes for its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, UTF-8; its folder is made when missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Write a json file whole.

    Raises:
        ValueError: If a number is NaN or infinite, which json does not have.
    """
    write_text(path, json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def link_or_copy(source: Path, target: Path) -> None:
    """Give a finished file, which nobody changes, a second name; copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The time during which this process is the only one of saetrack's that writes into a folder.

    Raises:
        RuntimeError: If another process has claimed it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RuntimeError(
            f"Another saetrack is writing into {folder}. Wait until it has ended, or choose another folder."
        ) from None
    try:
        yield
    finally:
        if [path.name for path in folder.iterdir()] == [".lock"]:  # nothing was written: leave nothing
            (folder / ".lock").unlink()
            folder.rmdir()
        lock.release()
