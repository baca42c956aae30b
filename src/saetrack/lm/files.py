"""Where an LLM checkpoint's files are: a folder, the Hub's cache on this disk, or the Hub itself.

Everything takes ``(model, revision, cache_dir)``; ``model`` that names an existing folder is that folder, and
anything else is a repository. The Hub is asked first and its cache is the fallback, so that what is listed,
hashed and loaded is the same commit.
"""

import json
import logging
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open

from saetrack.lm import hub_cache

logger = logging.getLogger(__name__)

# In the order in which transformers prefers them.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# tokenizer_config.json is not here: alone it holds no vocabulary.
TOKENIZER_FILES = frozenset({"tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"})
_BESIDE_A_VOCABULARY = (".json", ".model", ".txt", ".jinja")

# The HTTP library is requests, httpx or httpx2 by the version of huggingface_hub; HfHubHTTPError has its base class.
_NETWORK_ERRORS: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)

downloads_for: str | None = None
"""The run that what this process downloads belongs to, and that may evict it; None for what shall stay."""

_GO_ON = "run the same command again (`fit` with `--ckpt_path last`)"

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


def is_folder(model: str) -> bool:
    """Whether ``model`` is a folder on this disk, not a repository on the Hub."""
    return Path(model).is_dir()


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
    if constants.HF_HUB_OFFLINE or repo in _out_of_reach:
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
    except _NETWORK_ERRORS as error:
        raise ConnectionError(first_line(error)) from error
    files = {file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings or []}
    return HubFiles(commit=info.sha or "", sha256=files)


def forget_hub() -> None:
    """Ask the Hub anew for everything."""
    _ask_for_files.cache_clear()
    _out_of_reach.clear()


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
        except _NETWORK_ERRORS as error:
            _say_out_of_reach(repo, error)
        else:
            _out_of_reach.discard(repo)
            return [branch.name for branch in branches]
    refs = _cache(repo, cache_dir) / "refs"
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


def first_line(error: BaseException) -> str:
    """What an error says, without the lines that follow."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def cached_commit(repo: str, revision: str | None, cache_dir: str | Path | None = None) -> str | None:
    """Commit that a revision points to in the Hub's cache on this disk; None when it is not there."""
    cache, name = _cache(repo, cache_dir), revision or "main"
    reference = cache / "refs" / name
    if reference.is_file():
        return reference.read_text().strip()
    return name if (cache / "snapshots" / name).is_dir() else None


def local_folder(model: str, revision: str | None, cache_dir: str | Path | None = None) -> Path | None:
    """The folder on this disk with what is there of a checkpoint; None when nothing is."""
    if is_folder(model):
        return Path(model)
    commit = cached_commit(model, revision, cache_dir)
    folder = _cache(model, cache_dir) / "snapshots" / (commit or "none")
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
        return {name: _file_digest(folder / name) for name in weight_names(folder)}

    names = weights_on_hub(model, revision, remote, cache_dir)
    return {
        name: remote.sha256[name] or _file_digest(_download(model, revision, remote, [name], cache_dir) / name)
        for name in names
    }


def weights_on_hub(
    model: str, revision: str | None, remote: HubFiles, cache_dir: str | Path | None = None
) -> list[str]:
    """Names of a revision's weight files; an index of shards is downloaded, no weights are.

    Raises:
        FileNotFoundError: If there are none, or a shard is missing.
    """

    def read(name: str) -> str:
        return (_download(model, revision, remote, [name], cache_dir) / name).read_text()

    return names_of_weights(remote.sha256, read, label(model, revision))


def weight_names(folder: Path) -> list[str]:
    """Names of the weight files in a folder, safetensors before ``.bin``, shards by their index.

    Raises:
        FileNotFoundError: If there are none, or a shard is missing.
    """
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return names_of_weights(names, lambda name: (folder / name).read_text(), str(folder))


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
    except _NETWORK_ERRORS as error:
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


def names_of_weights(names: Iterable[str], read: Callable[[str], str], where: str) -> list[str]:
    """Names of the weight files among ``names``, safetensors before ``.bin``, shards by their index.

    Args:
        names: All that there are.
        read: Gives the text of one of them, the index.
        where: What holds them, for messages.

    Raises:
        FileNotFoundError: If there are none, or a shard is missing.
    """
    present = set(names)
    for single in WEIGHT_FILES:
        index = f"{single}.index.json"
        if single in present:
            return [single]
        if index in present:
            shards = _shards(read(index), f"{where}: {index}")
            missing = [shard for shard in shards if shard not in present]
            if missing:
                raise FileNotFoundError(
                    f"{where} lacks {len(missing)} of the {len(shards)} weight files in {index}, the first is "
                    f"{missing[0]}. Fetch it again, or leave this checkpoint out of the series."
                )
            return shards
    raise FileNotFoundError(
        f"{where} has no weights: expected {' or '.join(WEIGHT_FILES)}, whole or in shards with an index, but found "
        f"{', '.join(sorted(present)[:6]) or 'nothing'}. Fetch them, or leave this checkpoint out of the series."
    )


def _shards(index: str, where: str) -> list[str]:
    try:
        shards = sorted(set(json.loads(index)["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is damaged, or names no shards by tensor. Write or fetch it again.") from error
    if not shards:
        raise ValueError(f"{where} names no shards. Write or fetch it again.")
    return shards


def _file_digest(path: Path) -> str:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or damaged ({error}). Write or fetch it again.") from error
    elif _is_cut_archive(path):
        raise ValueError(f"{path} is truncated: it begins as an archive but has no directory. Write or fetch it again.")
    return hub_cache.digest_in_name(path) or hub_cache.sha256(path)


def _is_cut_archive(path: Path) -> bool:
    """Whether a file of torch.save lost its end; only those of torch before 1.6 are no archives."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04" and not zipfile.is_zipfile(path)


def _cache(repo: str, cache_dir: str | Path | None) -> Path:
    return Path(cache_dir or constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _absent(model: str, revision: str | None, cache_dir: str | Path | None) -> str:
    option = f" --revision {revision}" if revision else ""
    return (
        f"{label(model, revision)} is neither a folder here nor in the Hub's cache {_cache(model, cache_dir).parent}, "
        f"and the Hub is not reached. Unset HF_HUB_OFFLINE, or fetch it first: `hf download {model}{option}`."
    )


def _not_found_advice(repo: str) -> str:
    return f"Check the spelling at https://huggingface.co/{repo}; for a private or gated model, `hf auth login` first."
