"""A folder of files on the Hub, such as a track or an SAE: some downloaded at once, the rest when asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from saetrack.errors import first_line

SCHEME = "hf://"
REPOSITORY = re.compile(r"\w[\w.-]*/[\w.-]+")
"""The name of a repository, ``owner/name``."""
_ADDRESS = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?P<folder>(?:/[\w.+=-]+)*)(?:@(?P<revision>[\w./-]+))?")
# The HTTP library is requests, httpx or httpx2 by the version of huggingface_hub; HfHubHTTPError has its base class.
NETWORK_ERRORS: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)
"""What huggingface_hub raises when the Hub refuses or cannot be reached."""


@dataclass(frozen=True)
class HubFolder:
    """One commit of a repository, or of a folder in it.

    Args:
        repo: The repository, ``owner/name``.
        folder: The folder in it, empty for the repository itself.
        path: Its place in the Hub's cache, with what was downloaded so far. The commit is in its name.
    """

    repo: str
    folder: str
    path: Path

    @classmethod
    def open(cls, address: str, patterns: Sequence[str], above: Sequence[str] = ()) -> HubFolder:
        """Find a folder, or a file, and download some of its files.

        Args:
            address: ``hf://owner/name``, ``hf://owner/name/folder``, each with ``@revision`` where it is not main.
            patterns: What to download now of a folder, with ``*``; a file is downloaded itself.
            above: What to download of every folder that it lies in.

        Raises:
            ValueError: If the address is of another form.
            FileNotFoundError: If it is neither on a Hub that can be reached nor in its cache.
        """
        match = _ADDRESS.fullmatch(re.sub("^hf:/+", "", address))
        if match is None or ".." in address:
            raise ValueError(
                f"{address!r} is no address on the Hub; expected {SCHEME}owner/name or owner/name@revision."
            )
        folder = match["folder"].strip("/")
        wanted = [f"{folder}/{pattern}" if folder else pattern for pattern in patterns]
        wanted += [folder, *(str(parent / name) for parent in PurePosixPath(folder).parents for name in above)]
        try:
            root = snapshot_download(match["repo"], revision=match["revision"], allow_patterns=[*filter(None, wanted)])
        except NETWORK_ERRORS as error:
            raise _absent(address, error) from error
        return cls(match["repo"], folder, Path(root) / folder)

    @property
    def commit(self) -> str:
        """The commit that was found when it was opened; later downloads are of the same."""
        root = self.path.parents[self.folder.count("/")] if self.folder else self.path
        return root.name

    def folders_with(self, names: Sequence[str]) -> list[str]:
        """Folders in the whole repository that have a file of one of these names; empty without a network."""
        try:
            files = HfApi().list_repo_files(self.repo, revision=self.commit)
        except NETWORK_ERRORS:
            return []
        return sorted({str(PurePosixPath(file).parent) for file in files if PurePosixPath(file).name in names})

    def fetch(self, name: str) -> Path:
        """One of its files, downloaded unless it is here.

        Raises:
            FileNotFoundError: If the Hub does not have it, or cannot be reached.
        """
        inside = f"{self.folder}/{name}" if self.folder else name
        try:
            return Path(hf_hub_download(self.repo, inside, revision=self.commit))
        except NETWORK_ERRORS as error:
            raise _absent(f"{self.repo}/{inside}", error) from error


def is_hub_address(path: str | Path) -> bool:
    """Whether a path is an address on the Hub; ``pathlib`` makes one slash of two."""
    return str(path).startswith((SCHEME, "hf:/"))


def push_folder(folder: Path, repo: str) -> str:
    """Upload a folder as a model repository, which is made when it does not exist.

    Args:
        folder: What to upload.
        repo: ``owner/name``.

    Returns:
        Where it can be seen.

    Raises:
        OSError: If the Hub cannot be reached or refuses.
    """
    if REPOSITORY.fullmatch(repo) is None:
        raise ValueError(f"--push is {repo!r}; expected a repository's name, owner/name.")
    api = HfApi()
    try:
        url = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload a track of saetrack")
    except NETWORK_ERRORS as error:
        raise OSError(
            f"{folder} was written, but could not be pushed to {repo}: {first_line(error)}. `hf auth login`, then "
            f"push it with `hf upload {repo} {folder}`."
        ) from error
    return str(url)


def _absent(where: str, error: BaseException) -> FileNotFoundError:
    return FileNotFoundError(
        f"{where} is neither in the Hub's cache nor on a Hub that can be reached ({first_line(error)}). Check the "
        "spelling and the network; for a private repository, `hf auth login` first."
    )
