"""Make a track of SAEs that another library trained, to start a series from or to analyse."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import saetrack
from saetrack.hub import HubFolder, is_hub_address
from saetrack.lm.checkpoints import LLMCheckpoint
from saetrack.lm.names import NamedStep, family_of, parse_name, series_of_names
from saetrack.sae import SAE, sae_record
from saetrack.sae.formats import CONFIGURATIONS, FILES, ForeignSAE, detect_format, read_foreign, read_reference_map
from saetrack.storage import whole_folder
from saetrack.track import Track

_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+(/[\w.+=-]+)*(@[\w./-]+)?")
_PYTHIA = re.compile(r"pythia-[\w.-]+")
_TRANSFORMER_LENS = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")


@dataclass(frozen=True)
class ImportedFacts:
    """What a track needs and an SAE's file may not say; what is given here goes before what the file says.

    Args:
        model: The LLM: the folder or the repository of the checkpoint that the SAE reads.
        revision: The branch of that repository, such as ``step1000``.
        step: The LLM's training step; by default the number in the name of the revision or the folder.
        hookpoint: The module whose output the SAE reads, such as ``gpt_neox.layers.3``.
        tokenizer: Folder or repository of the tokenizer; by default the model's.
    """

    model: str | None = None
    revision: str | None = None
    step: int | None = None
    hookpoint: str | None = None
    tokenizer: str | None = None


def import_sae(source: str, track: Path, given: ImportedFacts) -> Track:
    """Make a track with one snapshot from an SAE's files.

    Args:
        source: A folder or a file, or ``owner/name``, ``owner/name/folder``, ``hf://owner/name@revision`` on the Hub.
        track: The track to make.
        given: What the files do not say.

    Raises:
        FileNotFoundError: If there is no such source.
        FileExistsError: If the track exists.
        ValueError: If the SAE cannot be held, or something is not known.
    """
    path = _located(source)
    foreign = read_foreign(path)
    llm = _llm(foreign, given, source)
    with _new_track(track) as folder:
        made = _create(folder, foreign, llm, given, source)
        _add(made, foreign, llm, {"format": detect_format(path), "source": source})
    return Track.open(track)


def import_map(path: Path, track: Path, given: ImportedFacts, steps: Mapping[int, int] | None) -> Track:
    """Make a whole track from the reference implementation's ``model_save_map*.json``.

    Args:
        path: The map, from the index of the LLM checkpoint to a pickled SAE.
        track: The track to make.
        given: What the pickles do not say.
        steps: LLM step by index; None for that of the Pythia and the stanford-crfm GPT-2 checkpoints, which the
            reference implementation followed.

    Raises:
        FileNotFoundError: If a file of the map is missing.
        FileExistsError: If the track exists.
        ValueError: If the map or a pickle is refused, or the step of an index is not known.
    """
    if given.step is not None or given.revision is not None:
        raise ValueError("--step and --revision are for one SAE; for a map, give the step of each index as `--steps`.")
    files = read_reference_map(path)
    if steps is not None:
        _check_steps(files, steps, path)
        files = {index: files[index] for index in sorted(files, key=lambda index: steps[index])}
    with _new_track(track) as folder:
        made: Track | None = None
        for index, file in files.items():
            foreign = read_foreign(file)
            step = _reference_step(index, foreign, path) if steps is None else steps[index]
            llm = _llm(foreign, replace(given, step=step), str(file))
            if made is None:
                made = _create(folder, foreign, llm, given, str(file))
            _add(made, foreign, llm, {"format": "reference", "source": str(file)})
    return Track.open(track)


@contextmanager
def _new_track(path: Path) -> Iterator[Path]:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is there already; choose another name with `--as`.")
    with whole_folder(path) as folder:
        yield folder


def _located(source: str) -> Path:
    path = Path(source)
    if path.exists():
        return path
    if not (is_hub_address(source) or _ON_HUB.fullmatch(source)):
        raise FileNotFoundError(f"{source} is neither a file or folder here nor the name of a repository on the Hub.")
    found = HubFolder.open(source, FILES, above=[CONFIGURATIONS[1]])
    if not found.path.is_file() and not any((found.path / name).is_file() for name in CONFIGURATIONS):
        there = found.folders_with(CONFIGURATIONS)
        more = f" and {len(there) - 6} more" if there[6:] else ""
        hint = f"; it has some in {', '.join(there[:6])}{more}: type {found.repo}/{there[0]}" if there else ""
        raise FileNotFoundError(f"{source} is no SAE that saetrack reads{hint}.")
    return found.path


def _create(track: Path, foreign: ForeignSAE, llm: LLMCheckpoint, given: ImportedFacts, source: str) -> Track:
    sae, origin = foreign.sae, foreign.origin
    facts = {
        "saetrack": saetrack.__version__,
        "model": llm.model,
        "hookpoint": _needed("--hookpoint", given.hookpoint or _module(origin.hookpoint, source), source),
        "tokenizer": [given.tokenizer, None] if given.tokenizer else [llm.model, llm.revision],
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "sae": sae_record(sae),
        "seed": None,
        "corpus_hash": None,
        "context_size": origin.context_size,
        "bos_token_id": None,
        "llm_dtype": "float32",
    }
    return Track.create(track, facts, {})


def _llm(foreign: ForeignSAE, given: ImportedFacts, source: str) -> LLMCheckpoint:
    model, revision = given.model or foreign.origin.model, given.revision or foreign.origin.revision
    if given.model is None and model is not None and _PYTHIA.fullmatch(model) is not None:
        # The reference implementation and TransformerLens leave the owner out.
        model = f"EleutherAI/{model}"
        revision = revision or (None if given.step is None else f"step{given.step}")
    model = _needed("--model", model, source)
    named = _named_step(model, revision or Path(model).name)
    step = given.step if given.step is not None or named is None else named.step
    tokens = named.tokens if named is not None and step == named.step else None
    return LLMCheckpoint(model, revision, _needed("--step", step, source), tokens)


def _named_step(model: str, name: str) -> NamedStep | None:
    """The place in its series that the name of a revision or folder says; None where it says none for certain."""
    parsed, family = parse_name(name), family_of(model)
    if parsed is None or parsed.bare:
        return None
    (named,) = series_of_names([name], family, whole=False)
    begins_anew = (parsed.stage or family.unprefixed) not in ("", "stage1")
    return None if begins_anew and named.tokens is None else named


def _add(track: Track, foreign: ForeignSAE, llm: LLMCheckpoint, imported: dict[str, Any]) -> None:
    sae = foreign.sae
    if (sae.d_in, sae.d_sae) != (track.facts["d_in"], track.facts["d_sae"]):
        raise ValueError(
            f"{imported['source']} has {sae.d_sae} latents of width {sae.d_in}; expected {track.facts['d_sae']} of "
            f"{track.facts['d_in']}, as the first SAE of the track has."
        )
    metadata = {
        "llm": {**asdict(llm), "commit": None, "weight_hash": None},
        "sae": sae_record(sae),
        "warm_start": "imported",
        "imported": imported,
    }
    previous = track[-1].tensor("W_dec") if len(track) else None
    track.write(len(track), sae, metadata, {}, _features(sae, previous))


def _features(sae: SAE, previous: torch.Tensor | None) -> pd.DataFrame:
    """A row per feature; how often it fires is not known without the LLM."""
    unknown = np.full(sae.d_sae, np.nan)
    cosine = unknown
    if previous is not None:
        cosine = torch.nn.functional.cosine_similarity(sae.W_dec.double(), previous.double(), dim=1).numpy()
    names = ("firing_frequency", "mean_activation", "max_activation", "functional_correlation")
    columns = {"feature": np.arange(sae.d_sae), **dict.fromkeys(names, unknown), "decoder_cosine_previous": cosine}
    return pd.DataFrame({**columns, "revived": np.zeros(sae.d_sae, dtype=bool)})


def _module(hookpoint: str | None, source: str) -> str | None:
    match = _TRANSFORMER_LENS.fullmatch(hookpoint or "")
    if match is None:
        return hookpoint
    layer = int(match[1]) - (match[2] == "pre")
    raise ValueError(
        f"{source} reads {hookpoint}, a name of TransformerLens; give the module whose output that is, such as "
        f"`--hookpoint gpt_neox.layers.{layer}` in a Pythia or `--hookpoint transformer.h.{layer}` in a GPT-2."
    )


def _needed(option: str, value: Any, source: str) -> Any:
    if value is None:
        raise ValueError(f"{source} does not say what `{option}` is; give it. `saetrack import --help` explains it.")
    return value


def _check_steps(files: Mapping[int, Path], steps: Mapping[int, int], path: Path) -> None:
    for index in files:
        if index not in steps:
            raise ValueError(f"{path}: `--steps` does not say the LLM step of index {index}; add it.")
    if len({steps[index] for index in files}) < len(files):
        raise ValueError(f"{path}: `--steps` gives two indices one LLM step; expected a step for each.")


def _reference_step(index: int, foreign: ForeignSAE, path: Path) -> int:
    model = foreign.origin.model or "an LLM without a name"
    for family, step_of in (("pythia", _pythia_step), ("stanford-gpt2", _crfm_step)):
        step = step_of(index)
        if family in model and step is not None:
            return step
    raise ValueError(
        f"{path}: the LLM step of index {index} of {model} is not known; give all of them, e.g. "
        f"`--steps '{{\"{index}\": 1000}}'`. Known are the 154 checkpoints of pythia and the 609 of stanford-gpt2."
    )


def _pythia_step(index: int) -> int | None:
    """Pythia's 154 branches in their order: 0, 1, 2, 4, ..., 512, then every 1,000."""
    steps = [0, *(2**i for i in range(10)), *range(1000, 143_001, 1000)]
    return steps[index] if index < len(steps) else None


def _crfm_step(index: int) -> int | None:
    """The 609 branches of stanford-crfm's GPT-2 in their order: every 10 to 100, 50 to 2k, 100 to 20k, then 1k."""
    steps = [*range(0, 100, 10), *range(100, 2000, 50), *range(2000, 20_000, 100), *range(20_000, 400_001, 1000)]
    return steps[index] if index < len(steps) else None
