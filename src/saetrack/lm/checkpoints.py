"""The series of LLM checkpoints: where they are, in which order, and how one is loaded.

A source lists its checkpoints with strictly increasing steps, numerically sorted, and pins one tokenizer for all of
them: the vocabulary does not change while an LLM is trained, but what is published beside a step can.
"""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from saetrack.hub import REPOSITORY
from saetrack.lm import files, hub_listing
from saetrack.lm.loading import LLMCheckpoint, commit_sha, load_llm, release_memory, save_random_llm, weight_hash
from saetrack.lm.names import (
    Family,
    NamedStep,
    family_of,
    parse_name,
    parse_repo_id,
    series_of_names,
    tokens_of,
    without_step,
)
from saetrack.lm.source import CheckpointSource, pinned_tokenizer
from saetrack.lm.trust import trust
from saetrack.lm.watching import DONE, Watch, Watcher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from saetrack.lm.pretrain import PretrainConfig

__all__ = [
    "CheckpointSource",
    "FolderSource",
    "HubSource",
    "LLMCheckpoint",
    "ListSource",
    "PretrainSource",
    "RepositoriesSource",
    "Watch",
    "Watcher",
    "commit_sha",
    "load_llm",
    "release_memory",
    "save_random_llm",
    "source_from_string",
    "weight_hash",
]


class FolderSource(CheckpointSource):
    """A folder of Hugging Face checkpoints: ``step*``, as ``saetrack pretrain`` writes them, or ``checkpoint-*``.

    Every name that ``saetrack.lm.names`` reads will do; folders with other names are left out.

    Args:
        path: The folder that holds ``step0``, ``step1``, ... or ``checkpoint-500``, ``checkpoint-1000``, ...
        tokenizer: Folder or repository of the tokenizer. By default that of the last checkpoint that has one, or the
            one in ``path`` itself.
        watch: True, or how, for a series that is still being written: what is complete of it is the series so far,
            and ``fit`` waits for more until its end.
        trust_remote_code: Let the code that lies in the checkpoints' folders run, where transformers does not know
            their LLM.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: str | None = None,
        watch: bool | Watch = False,
        trust_remote_code: bool = False,
    ) -> None:
        self.path = Path(path)
        self._tokenizer = tokenizer
        if trust_remote_code:
            trust(str(self.path))
        if watch:
            self.watcher = Watcher(
                str(self.path), Watch() if watch is True else watch, self._listed, (self.path / DONE).is_file
            )

    def checkpoints(self) -> list[LLMCheckpoint]:
        """The folders, sorted by the number in their names.

        Raises:
            FileNotFoundError: If the folder does not exist or holds no checkpoints.
            ValueError: If two checkpoints are of one step.
        """
        if self.watcher is not None:
            return self.watcher.so_far()
        if not self.path.is_dir():
            raise FileNotFoundError(
                f"{self.path} is not a folder. Give the one that holds the LLM checkpoints step0, step1, ... as `path`."
            )
        if not (series := self._listed()):
            one = (self.path / "config.json").is_file()
            found = ", ".join(list(self._folders())[:6]) or "no folders"
            raise FileNotFoundError(
                f"{self.path} holds no LLM checkpoints: expected folders named step{{N}} or checkpoint-{{N}}, found "
                + ("one model; give the folder above it." if one else f"{found}. Check `path`, or use a ListSource.")
            )
        return series

    def _listed(self) -> list[LLMCheckpoint]:
        """All that have a name, complete or not; none where there is no folder."""
        folders = self._folders()
        series = _named_steps(folders, str(self.path), "Move one of them elsewhere.")
        # HF Trainer writes 0 tokens unless it is told to count them, which says nothing
        seen = {n.name: files.trainer_state(folders[n.name]).get("num_input_tokens_seen") or n.tokens for n in series}
        return [LLMCheckpoint(str(folders[n.name]), None, n.step, seen[n.name]) for n in series]

    def left_out(self) -> list[str]:
        """The other folders that hold a model, but whose names say no step."""
        folders = self._folders()
        return [name for name in without_step(folders) if (folders[name] / "config.json").is_file()]

    def _folders(self) -> dict[str, Path]:
        return {path.name: path for path in sorted(self.path.glob("*")) if path.is_dir()}

    @property
    def tokenizer_name(self) -> tuple[str, str | None]:
        """The tokenizer that was given, or that of the last checkpoint that has one."""
        if self._tokenizer:
            return self._tokenizer, None
        if (pinned := pinned_tokenizer(self.checkpoints())) is not None:
            return pinned
        if files.has_tokenizer(str(self.path), None):
            return str(self.path), None
        raise FileNotFoundError(
            f"None of the LLM checkpoints in {self.path} has a tokenizer. Save one there, or name a folder or a "
            f"repository as the source's `tokenizer`."
        )


class HubSource(CheckpointSource):
    """A repository on the Hub with a branch for every checkpoint, such as Pythia's ``step1000``.

    The names of the usual families are read (``saetrack.lm.names``); branches with other names, ``main`` among them,
    are skipped. Without a network the revisions in the Hub's cache are the series.

    Args:
        repo: The repository, such as ``EleutherAI/pythia-160m-deduped``.
        revisions: Names of the branches to take; by default every one that names a step.
        steps: The LLM's training steps to take; by default all.
        tokenizer_revision: Revision of the tokenizer. By default that of the last checkpoint that has one, or ``main``.
        cache_dir: The Hub's cache, where it is not the one that ``HF_HOME`` names. Reading a track later needs
            ``HF_HUB_CACHE`` set to it.
        tokens_per_step: Tokens in a batch of the LLM's training (2_097_152 for Pythia), which gives every checkpoint
            its number of tokens. By default what is known of the repository.
        ingredient: Which of several parallel branches of a stage to take, such as OLMo 2's ``stage2-ingredient1-...``.
        watch: True, or how, for a repository that still gets new branches: what is complete of it is the series so
            far, and ``fit`` waits for more until its end.
    """

    def __init__(
        self,
        repo: str,
        revisions: list[str] | None = None,
        steps: list[int] | None = None,
        tokenizer_revision: str | None = None,
        cache_dir: str | Path | None = None,
        tokens_per_step: int | None = None,
        ingredient: int | None = None,
        watch: bool | Watch = False,
    ) -> None:
        self.repo = repo
        self._revisions = revisions
        self._chosen = steps
        self._tokenizer_revision = tokenizer_revision
        self._cache_dir = None if cache_dir is None else str(cache_dir)
        self._tokens_per_step = tokens_per_step
        self._ingredient = ingredient
        if watch:
            named = f"`{'steps' if steps is not None else 'revisions'}`"
            if steps is not None or revisions is not None:
                raise ValueError(f"A HubSource with `watch` takes what comes; leave {named} out, or `watch`.")
            self.watcher = Watcher(repo, Watch() if watch is True else watch, self._listed, self._is_done)

    def _is_done(self) -> bool:
        try:
            return DONE in hub_listing.ask_for_files(self.repo, None).sha256
        except OSError:  # out of reach, or no main
            return False

    def checkpoints(self) -> list[LLMCheckpoint]:
        """The revisions, sorted by the number in their names.

        Raises:
            FileNotFoundError: If neither the Hub nor its cache has the repository.
            ValueError: If no revision names a step, two name the same one, or a chosen step has none.
        """
        if self.watcher is not None:
            return self.watcher.so_far()
        series = self._listed()
        odd = next((name for name in self._revisions or [] if parse_name(name) is None), None)
        if odd is not None:
            raise ValueError(
                f"Revision {odd!r} of {self.repo} does not say its step: expected step{{N}} or checkpoint-{{N}} in "
                f"`revisions`. Name it with its step in a ListSource instead."
            )
        if not series:
            one = " Its own name says one: name it with its sisters in a RepositoriesSource."
            raise ValueError(
                f"{self.repo} has no revision named step{{N}} or checkpoint-{{N}}, only "
                f"{', '.join(self._names()[:6])}."
                + (one if parse_repo_id(self.repo) else " Name its checkpoints with their steps in a ListSource.")
            )
        if self._chosen is not None:
            missing = sorted(set(self._chosen) - {checkpoint.step for checkpoint in series})
            if missing:
                raise ValueError(
                    f"{self.repo} has no checkpoint of step {missing[0]}, which `steps` asks for ({len(missing)} of "
                    f"{len(self._chosen)} are missing). `saetrack checkpoints {self.repo}` lists what there is."
                )
            series = [checkpoint for checkpoint in series if checkpoint.step in set(self._chosen)]
        return series

    def _names(self) -> list[str]:
        return self._revisions if self._revisions is not None else hub_listing.hub_branches(self.repo, self._cache_dir)

    def _listed(self) -> list[LLMCheckpoint]:
        """All that have a name, complete or not."""
        family = family_of(self.repo, self._tokens_per_step)
        advice, names = "Name the ones to take as `revisions`.", self._names()
        whole = self._revisions is None and not hub_listing.is_out_of_reach(self.repo)
        series = _named_steps(names, self.repo, advice, family, self._ingredient, whole)
        return [LLMCheckpoint(self.repo, named.name, named.step, named.tokens, self._cache_dir) for named in series]

    def left_out(self) -> list[str]:
        """The branches that say no step, such as ``main``."""
        return without_step(self._names())

    @property
    def tokenizer_name(self) -> tuple[str, str | None]:
        """The repository, and the one revision whose tokenizer serves the whole series."""
        if self._tokenizer_revision:
            return self.repo, self._tokenizer_revision
        return pinned_tokenizer(self.checkpoints()) or (self.repo, "main")

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer that ``tokenizer_name`` pins."""
        return self._load_tokenizer(self._cache_dir)


class ListSource(CheckpointSource):
    """Checkpoints named one by one: for runs whose folders or branches do not say their steps.

    Args:
        checkpoints: Each with its folder or repository, revision and step, in the order of their steps.
        tokenizer: Folder or repository of the tokenizer. By default that of the last checkpoint that has one.
        tokenizer_revision: Revision of the tokenizer, where ``tokenizer`` is a repository.
        trust_remote_code: Let the code that lies in the checkpoints' folders run, where transformers does not know
            their LLM. For folders on this disk alone: download a repository, and read its code, first.
    """

    def __init__(
        self,
        checkpoints: list[LLMCheckpoint],
        tokenizer: str | None = None,
        tokenizer_revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if not checkpoints:
            raise ValueError("ListSource.checkpoints is empty. Name at least one, with model, revision and step.")
        for position, (before, after) in enumerate(pairwise(checkpoints), start=1):
            if after.step <= before.step:
                raise ValueError(
                    f"ListSource.checkpoints must have strictly increasing steps, but {after} follows {before} at "
                    f"position {position}. Sort the list by step, and name every step once."
                )
        for checkpoint in checkpoints if trust_remote_code else ():
            trust(checkpoint.model)
        self._checkpoints = list(checkpoints)
        self._tokenizer = tokenizer
        self._tokenizer_revision = tokenizer_revision

    def checkpoints(self) -> list[LLMCheckpoint]:
        """The checkpoints as they were given."""
        return list(self._checkpoints)

    @property
    def tokenizer_name(self) -> tuple[str, str | None]:
        """The tokenizer that was given, or that of the last checkpoint that has one."""
        if self._tokenizer:
            return self._tokenizer, self._tokenizer_revision
        if (pinned := pinned_tokenizer(self._checkpoints)) is not None:
            return pinned
        raise FileNotFoundError(
            f"None of the {len(self._checkpoints)} LLM checkpoints of the list has a tokenizer, the last is "
            f"{self._checkpoints[-1]}. Name a folder or a repository as `ListSource.tokenizer`."
        )


class RepositoriesSource(ListSource):
    """Repositories on the Hub that hold one checkpoint each, such as TinyLlama's and the MultiBERTs'.

    Args:
        repos: Their names, which say the steps, in any order: ``TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T``.
        tokenizer: Repository of the tokenizer. By default that of the last checkpoint that has one.

    Raises:
        ValueError: If a name does not say its step, or two say the same one.
    """

    def __init__(self, repos: list[str], tokenizer: str | None = None) -> None:
        series = []
        for repo in repos:
            parsed = parse_repo_id(repo)
            if parsed is None:
                raise ValueError(
                    f"The repository {repo!r} does not say its step: expected a name like org/llm-step-20k in `repos`. "
                    f"Name it with its step in a ListSource instead."
                )
            series.append(LLMCheckpoint(repo, None, parsed.step, tokens_of(parsed, family_of(repo))))
        super().__init__(sorted(series, key=lambda checkpoint: checkpoint.step), tokenizer)


class PretrainSource(CheckpointSource):
    """A folder that a small LLM is pretrained into when it is empty or unfinished; from then on a ``FolderSource``.

    Args:
        folder: Where the checkpoints are, or will be.
        pretrain: How the LLM is pretrained; the defaults take minutes on two CPU cores.
    """

    # jsonargparse resolves this name from the TYPE_CHECKING block; Optional, since a string cannot be or-ed with None.
    def __init__(self, folder: str | Path, pretrain: Optional["PretrainConfig"] = None) -> None:
        self.folder = Path(folder)
        self._pretrain = pretrain
        self._series = FolderSource(folder)

    def prepare(self) -> None:
        """Pretrain what is missing; returns at once when the series is complete."""
        # Lightning is imported only by those who pretrain: reading a track must not need it.
        from saetrack.lm.pretrain import PretrainConfig, pretrain

        pretrain(self.folder, self._pretrain or PretrainConfig())

    def checkpoints(self) -> list[LLMCheckpoint]:
        """The checkpoints in the folder; ``prepare`` makes them."""
        return self._series.checkpoints()

    @property
    def tokenizer_name(self) -> tuple[str, str | None]:
        """The tokenizer of the last checkpoint; ``prepare`` makes it."""
        return self._series.tokenizer_name


def source_from_string(text: str, ingredient: int | None = None) -> CheckpointSource:
    """The source that a word on the command line means: an existing folder, or a repository on the Hub.

    Args:
        text: The word.
        ingredient: As of ``HubSource``; a folder has none.

    Raises:
        ValueError: If it is neither a folder nor of the form ``org/name``, or its format needs more than a word.
    """
    if text and Path(text).is_dir():
        # they are CheckpointSources, so their module imports this one
        from saetrack.lm.local.recognise import local_source

        return local_source(Path(text)) or FolderSource(text)
    if REPOSITORY.fullmatch(text):
        return HubSource(text, ingredient=ingredient)
    raise ValueError(
        f"{text!r} is neither a folder nor a repository on the Hub. Type an existing folder that holds step0, step1, "
        f"..., or a name like EleutherAI/pythia-160m-deduped."
    )


def _named_steps(
    names: Iterable[str],
    where: str,
    advice: str,
    family: Family | None = None,
    ingredient: int | None = None,
    whole: bool = True,
) -> list[NamedStep]:
    try:
        return series_of_names(names, family, ingredient, whole)
    except ValueError as error:
        raise ValueError(f"{where}: {error} {advice}") from error
