"""What the Hub says of a repository, asked once in the life of a process: its branches, and the files of a revision.

Nothing is downloaded. Where the Hub cannot be reached that is said once for each repository, and what its cache on this
disk holds takes its place.
"""

import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from saetrack.errors import first_line
from saetrack.hub import NETWORK_ERRORS
from saetrack.lm import hub_cache

logger = logging.getLogger(__name__)

_out_of_reach: set[str] = set()
"""Repositories that the Hub was last asked for in vain, so that a long series does not wait for each revision."""


@dataclass(frozen=True)
class HubFiles:
    """What the Hub says about one revision.

    Args:
        commit: The commit that the revision points to.
        sha256: File name -> SHA-256 of its content; None for a small file that is not in large-file storage.
    """

    commit: str
    sha256: dict[str, str | None]


def label(model: str, revision: str | None) -> str:
    """How messages name a checkpoint: ``folder`` or ``org/name@revision``."""
    return model if revision is None else f"{model}@{revision}"


def hub_files(repo: str, revision: str | None) -> HubFiles | None:
    """Commit and file hashes of a revision, from the Hub; nothing is downloaded.

    Returns:
        None when offline or when the Hub cannot be reached. What the Hub said is kept for the life of the process.

    Raises:
        FileNotFoundError: If the Hub has no such repository or revision.
    """
    if repo.startswith((".", "/", "~")) or repo.count("/") > 1:
        raise FileNotFoundError(
            f"There is no folder {repo} (from {Path.cwd()}), and it cannot be a repository's name. Run from the folder "
            "that the path starts in, or put the LLM checkpoints back."
        )
    if is_out_of_reach(repo):
        return None
    try:
        return _ask_for_files(repo, revision)
    except FileNotFoundError:
        raise
    except OSError as error:
        _say_out_of_reach(repo, error)
        return None


@lru_cache(maxsize=4096)
def _ask_for_files(repo: str, revision: str | None) -> HubFiles:
    return ask_for_files(repo, revision)


def ask_for_files(repo: str, revision: str | None) -> HubFiles:
    """As ``hub_files``, asked anew: a branch that is still written to has other files an hour later.

    Raises:
        FileNotFoundError: If the Hub has no such repository or revision.
        OSError: If the Hub cannot be reached.
    """
    try:
        info = hub_cache.patiently(lambda: HfApi().model_info(repo, revision=revision, files_metadata=True))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(f"The Hub has no {label(repo, revision)}. {_not_found_advice(repo)}") from error
    except NETWORK_ERRORS as error:
        raise ConnectionError(first_line(error)) from error
    files = {file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings or []}
    return HubFiles(commit=info.sha or "", sha256=files)


def forget_hub() -> None:
    """Ask the Hub anew for everything."""
    _ask_for_files.cache_clear()
    _out_of_reach.clear()


def is_out_of_reach(repo: str) -> bool:
    """Whether the Hub is not asked for a repository, so that only what its cache holds is known."""
    return bool(constants.HF_HUB_OFFLINE) or repo in _out_of_reach


def hub_branches(repo: str, cache_dir: str | Path | None = None) -> list[str]:
    """Names of a repository's branches; offline, of the revisions that the Hub's cache holds.

    Raises:
        FileNotFoundError: If neither the Hub nor its cache has the repository.
    """
    offline = bool(constants.HF_HUB_OFFLINE)
    if not offline:
        try:
            branches = hub_cache.patiently(lambda: HfApi().list_repo_refs(repo).branches)
        except RepositoryNotFoundError as error:
            raise FileNotFoundError(f"The Hub has no model {repo}. {_not_found_advice(repo)}") from error
        except NETWORK_ERRORS as error:
            _say_out_of_reach(repo, error)
        else:
            _out_of_reach.discard(repo)
            return [branch.name for branch in branches]
    refs = hub_cache.repository_folder(repo, cache_dir) / "refs"
    names = sorted(path.relative_to(refs).as_posix() for path in refs.rglob("*") if path.is_file())
    if not names:
        why = "HF_HUB_OFFLINE is set" if offline else "the Hub cannot be reached"
        raise FileNotFoundError(
            f"{repo} is no folder here, {why}, and the Hub's cache {refs.parent.parent} holds no revision of it. "
            f"Download some first, on a machine with a network: `hf download {repo} --revision step1000`."
        )
    return names


def _say_out_of_reach(repo: str, error: BaseException) -> None:
    if repo not in _out_of_reach:
        _out_of_reach.add(repo)
        reason = first_line(error)
        logger.warning("The Hub cannot be reached (%s); going on with what its cache holds of %s.", reason, repo)


def _not_found_advice(repo: str) -> str:
    return f"Check the spelling at https://huggingface.co/{repo}; for a private or gated model, `hf auth login` first."
