"""Where an LLM checkpoint's files are: a folder, the Hub's cache on this disk, or the Hub itself.

Everything takes ``(model, revision, cache_dir)``; ``model`` that names an existing folder is that folder, and
anything else is a repository. The Hub is asked first and its cache is the fallback, so that what is listed,
hashed and loaded is the same commit.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from saetrack.errors import first_line
from saetrack.hub import NETWORK_ERRORS
from saetrack.lm import hub_cache
from saetrack.lm.hub_listing import HubFiles, hub_files, label
from saetrack.lm.weight_files import (
    file_digest,
    fingerprint_of,
    names_of_weights,
    preferred_format,
    weight_names,
    whole_formats,
)

# tokenizer_config.json is not here: alone it holds no vocabulary.
TOKENIZER_FILES = frozenset({"tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"})
_BESIDE_A_VOCABULARY = (".json", ".model", ".txt", ".jinja")

downloads_for: str | None = None
"""The run that what this process downloads belongs to, and that may evict it; None for what shall stay."""

_GO_ON = "run the same command again (`fit` with `--ckpt_path last`)"


def is_folder(model: str) -> bool:
    """Whether ``model`` is a folder on this disk, not a repository on the Hub."""
    return Path(model).is_dir()


def cached_commit(repo: str, revision: str | None, cache_dir: str | Path | None = None) -> str | None:
    """Commit that a revision points to in the Hub's cache on this disk; None when it is not there."""
    cache, name = hub_cache.repository_folder(repo, cache_dir), revision or "main"
    reference = cache / "refs" / name
    if reference.is_file():
        return reference.read_text().strip()
    return name if (cache / "snapshots" / name).is_dir() else None


def local_folder(model: str, revision: str | None, cache_dir: str | Path | None = None) -> Path | None:
    """The folder on this disk with what is there of a checkpoint; None when nothing is."""
    if is_folder(model):
        return Path(model)
    commit = cached_commit(model, revision, cache_dir)
    folder = hub_cache.repository_folder(model, cache_dir) / "snapshots" / (commit or "none")
    return folder if commit and folder.is_dir() else None


def commit_of(model: str, revision: str | None, cache_dir: str | Path | None = None) -> str | None:
    """Commit of a revision; None for a folder, and for a revision that only an unreachable Hub could resolve."""
    if is_folder(model):
        return None
    remote = hub_files(model, revision)
    return remote.commit if remote else cached_commit(model, revision, cache_dir)


def has_tokenizer(model: str, revision: str | None, cache_dir: str | Path | None = None) -> bool:
    """Whether a checkpoint comes with its tokenizer's vocabulary."""
    return not TOKENIZER_FILES.isdisjoint(file_names(model, revision, cache_dir))


def file_names(model: str, revision: str | None, cache_dir: str | Path | None = None) -> set[str]:
    """Names of a checkpoint's files; empty where there is no such checkpoint."""
    try:
        remote = None if is_folder(model) else hub_files(model, revision)
    except FileNotFoundError:
        return set()
    folder = local_folder(model, revision, cache_dir)
    return set(remote.sha256) if remote else {path.name for path in folder.iterdir()} if folder else set()


def trainer_state(folder: Path) -> dict[str, Any]:
    """What Hugging Face's Trainer wrote about its progress; empty where there is none, or where it is being written."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def weight_digests(model: str, revision: str | None, cache_dir: str | Path | None = None) -> dict[str, str]:
    """SHA-256 of each weight file of a checkpoint, by file name in sorted order.

    The Hub knows it without a download, and names its cached copies by it; files in a folder are read.

    Raises:
        FileNotFoundError: If there are no weights, or a shard is missing.
        ValueError: If a file on this disk is truncated, or an index names no shards.
    """
    remote = None if is_folder(model) else hub_files(model, revision)
    if remote is None:
        folder = local_folder(model, revision, cache_dir)
        if folder is None:
            raise FileNotFoundError(_absent(model, revision, cache_dir))
        return {name: file_digest(folder / name) for name in weight_names(folder)}

    names = weights_on_hub(model, revision, remote, cache_dir)
    return {
        name: remote.sha256[name] or file_digest(_download(model, revision, remote, [name], cache_dir) / name)
        for name in names
    }


def fingerprints(model: str, revision: str | None, cache_dir: str | Path | None = None) -> list[str]:
    """What tells the weights of a checkpoint from others, for each format that they are there in.

    The first is of those that are loaded. A branch may hold them as safetensors and as ``.bin``, and another only as
    ``.bin``; of a folder only the first are read.

    Raises:
        FileNotFoundError: As for ``weight_digests``.
        ValueError: As for ``weight_digests``.
    """
    loaded = weight_digests(model, revision, cache_dir)
    found = [fingerprint_of(loaded)]
    remote = None if is_folder(model) else hub_files(model, revision)
    listed = {} if remote is None else remote.sha256
    for names in whole_formats(listed).values():
        digests = {name: sha for name in names if (sha := listed[name]) is not None}
        if set(names) == set(digests) != set(loaded):
            found.append(fingerprint_of(digests))
    return found


def weights_on_hub(
    model: str, revision: str | None, remote: HubFiles, cache_dir: str | Path | None = None
) -> list[str]:
    """Names of a revision's weight files. No weights are downloaded, and an index of shards only for odd names.

    Raises:
        FileNotFoundError: If there are none, or a shard is missing.
        ValueError: If an index is damaged or names no shards.
    """
    if (preferred := preferred_format(remote.sha256)) in (whole := whole_formats(remote.sha256)):
        return whole[preferred]

    def read(name: str) -> str:
        return (_download(model, revision, remote, [name], cache_dir) / name).read_text(encoding="utf-8")

    return names_of_weights(remote.sha256, read, label(model, revision))


def fetch(model: str, revision: str | None, cache_dir: str | Path | None = None) -> Path:
    """Folder with a checkpoint's configuration and weights, downloaded into the Hub's cache where needed.

    Large files are held against their hash once in the life of the process, and no other process evicts them from
    then on.

    Raises:
        FileNotFoundError: If they are neither here nor on a Hub that can be reached.
        OSError: If the Hub fails in the middle of it. Files that are whole stay.
    """
    if is_folder(model):
        return Path(model)
    remote = hub_files(model, revision)
    commit = remote.commit if remote else cached_commit(model, revision, cache_dir)
    if commit is None:
        raise FileNotFoundError(_absent(model, revision, cache_dir))
    cached = hub_cache.CachedRevision(model, commit, cache_dir)
    cached.hold()
    if remote is None:
        if not cached.folder.is_dir():
            raise FileNotFoundError(_absent(model, revision, cache_dir))
        weights = weight_names(cached.folder)
    else:
        weights = list(weight_digests(model, revision, cache_dir))
        if downloads_for is not None and not any((cached.folder / name).exists() for name in weights):
            cached.own(downloads_for)
        texts = [name for name in remote.sha256 if name.endswith(".json") and "/" not in name]
        _download(model, revision, remote, [*texts, *weights], cache_dir)
    try:
        for name in weights:
            hub_cache.check_content(cached.folder / name, remote.sha256[name] if remote else None)
    except ValueError as error:
        raise ValueError(f"{label(model, revision)}: {error}: {_GO_ON}.") from error
    return cached.folder


def fetch_tokenizer(model: str, revision: str | None, cache_dir: str | Path | None = None) -> Path:
    """Folder with a checkpoint's tokenizer, downloaded into the Hub's cache where needed.

    Raises:
        FileNotFoundError: If it is neither here nor on a Hub that can be reached.
        OSError: If the Hub fails in the middle of it.
    """
    remote = None if is_folder(model) else hub_files(model, revision)
    if remote is not None:
        names = [name for name in remote.sha256 if name.endswith(_BESIDE_A_VOCABULARY) and "/" not in name]
        return _download(model, revision, remote, names, cache_dir)
    folder = local_folder(model, revision, cache_dir)
    if folder is None:
        raise FileNotFoundError(_absent(model, revision, cache_dir))
    return folder


def _download(
    repo: str, revision: str | None, remote: HubFiles, names: list[str], cache_dir: str | Path | None
) -> Path:
    """Have files of a revision in the cache; the Hub is not asked for those that are there."""
    folder = hub_cache.CachedRevision(repo, remote.commit, cache_dir).folder
    # one is asked for by the branch's name, which notes in the cache where the branch points; then all by the commit
    if names and cached_commit(repo, revision, cache_dir) != remote.commit:
        _download_one(repo, revision, names[0], revision, cache_dir)
    for name in names:
        if not (folder / name).exists():
            _download_one(repo, revision, name, remote.commit, cache_dir)
    return folder


def _download_one(repo: str, revision: str | None, name: str, at: str | None, cache_dir: str | Path | None) -> None:
    where = label(repo, revision)
    try:
        hub_cache.patiently(lambda: hf_hub_download(repo, name, revision=at, cache_dir=cache_dir))
    except NETWORK_ERRORS as error:
        here = isinstance(error, LocalEntryNotFoundError)
        if not here and isinstance(error, EntryNotFoundError | RepositoryNotFoundError | RevisionNotFoundError):
            raise FileNotFoundError(
                f"The Hub no longer has {name} of {where}. Leave the LLM checkpoint out of the series "
                f"(`scheduler.steps`), or {_GO_ON} when it is back."
            ) from error
        cause = error.__cause__ if here and error.__cause__ else error  # why huggingface_hub looked into its cache
        raise OSError(
            f"The download of {name} of {where} broke off ({first_line(cause)}). What is whole is kept: {_GO_ON} when "
            "the Hub can be reached."
        ) from error


def _absent(model: str, revision: str | None, cache_dir: str | Path | None) -> str:
    option = f" --revision {revision}" if revision else ""
    cache = hub_cache.repository_folder(model, cache_dir).parent
    return (
        f"{label(model, revision)} is neither a folder here nor in the Hub's cache {cache}, and the Hub is not "
        f"reached. Unset HF_HUB_OFFLINE, or fetch it first: `hf download {model}{option}`."
    )
