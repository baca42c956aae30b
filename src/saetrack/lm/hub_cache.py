"""The Hub's cache on this disk: patience with a busy Hub, hashes that are checked, and room made by eviction.

Several processes may share one cache. Each holds a shared lock on every revision that it has read, and a revision is
evicted only by the run that downloaded it, and only when nobody else holds it.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from huggingface_hub import constants, scan_cache_dir
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import repo_folder_name

from saetrack.hub import NETWORK_ERRORS

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CAN_LOCK = fcntl is not None
"""Whether this system has the locks without which nothing is evicted."""

Answer = TypeVar("Answer")

_BUSY = (429, 500, 502, 503, 504)
_WAITS = (1.0, 2.0, 4.0, 8.0)
_LONGEST_WAIT = 600.0
"""Seconds. The Hub counts requests in windows of five minutes."""

# of httpx and httpx2; requests does not tell a cut connection from a refused one
_CUT = ("ReadError", "ReadTimeout", "RemoteProtocolError")

_RATE_LIMIT = re.compile(r"r=0;\s*t=(\d{1,6})", re.ASCII)
"""Nothing left, and seconds until there is: ``"api";r=0;t=55``."""

_held: dict[Path, IO[str]] = {}
"""Open lock files of the revisions that this process reads, by path."""

_checked: set[Path] = set()
"""Files whose content this process has hashed, by their place in the cache."""


def patiently(ask: Callable[[], Answer], waits: Sequence[float] = _WAITS) -> Answer:
    """Ask again while the Hub is busy or cuts the answer off, after the time that it names or 1, 2, 4 and 8 seconds.

    huggingface_hub 2.4.0 does the same where it reads a file's head or lists a tree, and for a 429 or a cut connection
    in the middle of a file, which it resumes; but not for a 5xx at the start of a file, nor where it looks up a
    revision.

    Args:
        ask: The question.
        waits: Seconds before each repetition.

    Raises:
        HfHubHTTPError: What the Hub answered last.
        Exception: What the HTTP library says of the network.
    """
    try:
        return ask()
    except NETWORK_ERRORS as error:
        response = getattr(error, "response", None)
        busy = isinstance(error, HfHubHTTPError) and response is not None and response.status_code in _BUSY
        if not waits or not (busy or _was_cut(error)):
            raise
        pause = _named_pause(response.headers) if busy and response is not None else None
    time.sleep(waits[0] if pause is None else min(pause, _LONGEST_WAIT))
    return patiently(ask, waits[1:])


def _was_cut(error: BaseException) -> bool:
    """Whether a connection that stood was lost; one that never stood is no network, and is not tried again."""
    return type(error).__name__ in _CUT or (error.__cause__ is not None and _was_cut(error.__cause__))


def _named_pause(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer asks to wait: in ``Retry-After``, or in the ``RateLimit`` that the Hub itself sends."""
    named = headers.get("Retry-After", "")
    if named.isdecimal():
        return float(named)
    left = _RATE_LIMIT.search(headers.get("RateLimit", ""))
    return None if left is None else float(left[1]) + 1  # whole seconds, rounded down


def repository_folder(repo: str, cache_dir: str | Path | None) -> Path:
    """A repository's place in the cache, whether it is there or not; ``cache_dir`` where it is not the usual cache."""
    return Path(cache_dir or constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


@dataclass(frozen=True)
class CachedRevision:
    """A revision's place in the cache, whether it is there or not.

    Args:
        repo: The repository.
        commit: The commit.
        cache_dir: The cache, where it is not the usual one.
    """

    repo: str
    commit: str
    cache_dir: str | Path | None = None

    @property
    def cache(self) -> Path:
        """The cache's folder."""
        return Path(self.cache_dir or constants.HF_HUB_CACHE)

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return repository_folder(self.repo, self.cache_dir) / "snapshots" / self.commit

    @property
    def _note(self) -> Path:
        """The lock file, beside those of huggingface_hub; it names the run that downloaded the revision."""
        return self.cache / ".locks" / self.folder.parents[1].name / f"saetrack-{self.commit}"

    def hold(self) -> None:
        """Keep other processes from evicting it until this one ends or lets it go.

        Where the cache cannot be written, or its file system has no locks, nothing is evicted and nothing is held.
        """
        if fcntl is None or self._note in _held:
            return
        try:
            self._note.parent.mkdir(parents=True, exist_ok=True)
            file = self._note.open("a", encoding="utf-8")
            fcntl.flock(file, fcntl.LOCK_SH)
        except OSError:
            return
        _held[self._note] = file

    def let_go(self) -> None:
        """The end of ``hold``."""
        if (file := _held.pop(self._note, None)) is not None:
            file.close()

    def own(self, run: str) -> None:
        """Note that a run downloads it, and may therefore evict it."""
        self._note.parent.mkdir(parents=True, exist_ok=True)
        self._note.write_text(run, encoding="utf-8")

    def evict(self, run: str, names: Iterable[str]) -> bool:
        """Delete it from the cache; files that it shares with another revision stay.

        Args:
            run: The run that asks.
            names: The branches by which it knows the revision; one with another name besides is left alone.

        Returns:
            Whether it is gone. It stays when it is another's, or when another process holds it.
        """
        if fcntl is None or not self._note.is_file() or self._note.read_text(encoding="utf-8") != run:
            return False
        with self._note.open("r+", encoding="utf-8") as note:
            try:
                fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
            cached = scan_cache_dir(self.cache)
            revisions = {r.commit_hash: r for repo in cached.repos if repo.repo_id == self.repo for r in repo.revisions}
            found = revisions.get(self.commit)
            if found is None or not found.refs <= set(names):
                return False
            cached.delete_revisions(self.commit).execute()
            _checked.difference_update({path for path in _checked if self.folder in path.parents})
            note.truncate(0)
        return True


def digest_in_name(path: Path) -> str | None:
    """The SHA-256 by which the cache names a large file; None for a small one, and for a file that is in no cache."""
    blob = Path(os.readlink(path)).name if path.is_symlink() else ""
    # 40 hex digits are git's name of a small file
    return blob if len(blob) == 64 and set(blob) <= set("0123456789abcdef") else None


def check_content(path: Path, digest: str | None) -> None:
    """Hold a file against the Hub's SHA-256 of it, once in the life of the process.

    Over plain HTTP huggingface_hub compares only the size.

    Args:
        path: Its place in the cache.
        digest: What the Hub says; where None, what the file's name in the cache says.

    Raises:
        ValueError: If the content is another. The file is removed then, so that it is downloaded anew.
    """
    expected = digest or digest_in_name(path)
    if expected is None or path in _checked:
        return
    if (found := sha256(path)) != expected:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise ValueError(
            f"{path.name} was damaged on its way: its SHA-256 is {found[:12]}..., but the Hub says {expected[:12]}... "
            "It was removed from the cache"
        )
    _checked.add(path)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
