"""Where an LLM checkpoint's files are: a folder, the Hub's cache on this disk, or the Hub itself.

Everything takes ``(model, revision, cache_dir)``; ``model`` that names an existing folder is that folder, and
anything else is a repository. The Hub is asked first and its cache is the fallback, so that what is listed,
hashed and loaded is the same commit.
"""

import hashlib
import json
import logging
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)

# In the order in which transformers prefers them.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# tokenizer_config.json is not here: alone it holds no vocabulary.
TOKENIZER_FILES = frozenset({"tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"})

# The HTTP library is requests, httpx or httpx2 by the version of huggingface_hub; HfHubHTTPError has its base class.
_NETWORK_ERRORS: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)


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


@lru_cache(maxsize=4096)
def hub_files(repo: str, revision: str | None) -> HubFiles | None:
    """Commit and file hashes of a revision, from the Hub; nothing is downloaded.

    Returns:
        None when offline or when the Hub cannot be reached. Kept for the life of the process.

    Raises:
        FileNotFoundError: If the Hub has no such repository or revision.
    """
    if repo.startswith((".", "/", "~")) or repo.count("/") > 1:
        raise FileNotFoundError(
            f"There is no folder {repo} (from {Path.cwd()}), and it cannot be a repository's name. Run from the folder "
            "that the path starts in, or put the LLM checkpoints back."
        )
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(f"The Hub has no {label(repo, revision)}. {_not_found_advice(repo)}") from error
    except _NETWORK_ERRORS as error:
        logger.warning("The Hub cannot be reached (%s); using what its cache holds of %s.", error, repo)
        return None
    files = {file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings or []}
    return HubFiles(commit=info.sha or "", sha256=files)


def hub_branches(repo: str, cache_dir: str | Path | None = None) -> list[str]:
    """Names of a repository's branches; offline, of the revisions that the Hub's cache holds.

    Raises:
        FileNotFoundError: If neither the Hub nor its cache has the repository.
    """
    offline = bool(constants.HF_HUB_OFFLINE)
    if not offline:
        try:
            return [branch.name for branch in HfApi().list_repo_refs(repo).branches]
        except RepositoryNotFoundError as error:
            raise FileNotFoundError(f"The Hub has no model {repo}. {_not_found_advice(repo)}") from error
        except _NETWORK_ERRORS as error:
            logger.warning("The Hub cannot be reached (%s); listing the revisions of %s in its cache.", error, repo)
    refs = _cache(repo, cache_dir) / "refs"
    names = sorted(path.relative_to(refs).as_posix() for path in refs.rglob("*") if path.is_file())
    if not names:
        why = "HF_HUB_OFFLINE is set" if offline else "the Hub cannot be reached"
        raise FileNotFoundError(
            f"{repo} is no folder here, {why}, and the Hub's cache {refs.parent.parent} holds no revision of it. "
            f"Download some first, on a machine with a network: `hf download {repo} --revision step1000`."
        )
    return names


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

    def download(name: str) -> Path:
        return Path(hf_hub_download(model, name, revision=revision, cache_dir=cache_dir))

    where = label(model, revision)
    names = _weight_names(remote.sha256, lambda name: download(name).read_text(), where)
    return {name: remote.sha256[name] or _file_digest(download(name)) for name in names}


def weight_names(folder: Path) -> list[str]:
    """Names of the weight files in a folder, safetensors before ``.bin``, shards by their index.

    Raises:
        FileNotFoundError: If there are none, or a shard is missing.
    """
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return _weight_names(names, lambda name: (folder / name).read_text(), str(folder))


def fetch(model: str, revision: str | None, cache_dir: str | Path | None = None) -> Path:
    """Folder with a checkpoint's configuration and weights, downloaded into the Hub's cache where needed.

    Raises:
        FileNotFoundError: If they are neither here nor on a Hub that can be reached.
    """
    remote = None if is_folder(model) else hub_files(model, revision)
    if remote is None:
        folder = local_folder(model, revision, cache_dir)
        if folder is None:
            raise FileNotFoundError(_absent(model, revision, cache_dir))
        return folder
    wanted = ["*.json", *weight_digests(model, revision, cache_dir)]
    return Path(snapshot_download(model, revision=revision, cache_dir=cache_dir, allow_patterns=wanted))


def _weight_names(names: Iterable[str], read: Callable[[str], str], where: str) -> list[str]:
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
    blob = path.resolve().name
    # The Hub's cache names a large file by the SHA-256 of its content, so 40 hex digits (git) are not enough.
    if path.is_symlink() and len(blob) == 64 and set(blob) <= set("0123456789abcdef"):
        return blob
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


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
