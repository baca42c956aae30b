"""The controls of a track that an analysis may compare it with; one made otherwise is refused, not averaged in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from saetrack.track import Snapshot, Track

_OWN = ("schema", "saetrack", "control", "recipe", "model", "tokenizer")
"""Facts in which a control may differ: the LLM is known by its weights, its tokenizer by the corpus."""
_BUDGETS = ("scheduler.tokens_first", "scheduler.tokens_next")
_WARM_START = "scheduler.warm_start"


def controls_of(track: Track, kind: str) -> list[Track]:
    """The complete controls of a kind.

    Args:
        track: The track that they calibrate.
        kind: As `Track.controls` takes it.

    Raises:
        ValueError: If one was made by another recipe, or on LLM checkpoints with other weights.
    """
    controls = track.controls(kind)
    for control in controls:
        _refuse_made_otherwise(track, control)
    return controls


def one_step_controls(track: Track, kind: str) -> dict[int, list[Track]]:
    """The controls that repeat one stage, by the place of its snapshot in the track.

    Args:
        track: The track that they calibrate.
        kind: ``null`` or ``replica``.

    Returns:
        Position to controls; snapshot 0 of each is the one of the track that the stage began from.

    Raises:
        ValueError: If a control begins with another snapshot than the track's, or was made by another recipe.
    """
    found: dict[int, list[Track]] = {}
    for control in controls_of(track, kind):
        number = control.facts["control"]["position"]  # in the order of training, which no extension changes
        if number is None:
            continue
        snapshot = next((s for s in track if s.number == number), None)
        start = None if snapshot is None else track.began_from(snapshot)
        if snapshot is None or start is None:
            continue  # it lies between LLM checkpoints of equal weights, or a snapshot of it is missing
        _refuse_another_start(track, control, start)
        found.setdefault(snapshot.position, []).append(control)
    return found


def stage_place(track: Track, position: int) -> int | None:
    """The place of the stage that led to a snapshot: that of its later end, as analyses count stages.

    None where its ends are no neighbours: a snapshot between them was added later.
    """
    before = track.before(track[position])
    ends = (position,) if before is None else (position, before.position)
    return max(ends) if max(ends) - min(ends) == 1 else None


def repeated_stages(track: Track, kind: str) -> dict[int, list[tuple[Track, Snapshot, Snapshot]]]:
    """The controls that repeat a stage between neighbours, by its `stage_place`; as `null_steps` gives them."""
    found = {}
    for position, controls in one_step_controls(track, kind).items():
        place = stage_place(track, position)
        if place is not None:
            found[place] = [(control, control[0], control[1]) for control in controls]
    return found


def null_steps(track: Track) -> dict[int, list[tuple[Track, Snapshot, Snapshot]]]:
    """What trained once more on the LLM checkpoint that a stage begins from, by the place of the stage's snapshot.

    Those are the ``null`` controls and, of the stage that follows, the stages between LLM checkpoints of equal weights,
    which the series holds by itself.

    Args:
        track: The track that they calibrate, from `Track.distinct`.

    Returns:
        By place: the series, its snapshot before and its snapshot after.

    Raises:
        ValueError: As `one_step_controls`.
    """
    found = repeated_stages(track, "null")
    whole = track.whole
    for steps in whole.equal_weights:
        place = 1 + max(track.at(step).position for step in steps if step in track.steps)
        pairs = ((whole.before(after), after) for after in map(whole.at, steps))
        free = [(whole, before, after) for before, after in pairs if before is not None and before.step in steps]
        if free and place < len(track):  # else no stage begins there
            found.setdefault(place, []).extend(free)
    return found


def null_chains(track: Track) -> list[Track]:
    """The null chains: the track's first snapshot trained again and again on the first LLM checkpoint.

    Args:
        track: The track that they calibrate.

    Raises:
        ValueError: If a chain begins with another snapshot than the track's, or was made by another recipe, or the
            track is no chain itself.
    """
    chains = [control for control in controls_of(track, "null") if control.facts["control"]["position"] is None]
    for chain in chains:
        if not track.is_forward_chain:
            raise ValueError(
                f"The control {chain.path} repeats a series that was trained forward in one go, but {track.path} was "
                "not, or has been extended since, so it cannot calibrate it. Move it out of the folder."
            )
        _refuse_another_start(track, chain, track[0])
    return chains


def scratch_controls(track: Track) -> dict[str, list[Track]]:
    """The SAEs trained from scratch, by their budget: ``next``, that of a stage, or ``first``.

    Args:
        track: The track that they calibrate.

    Raises:
        ValueError: If a control was made by another recipe.
    """
    found: dict[str, list[Track]] = {}
    for control in controls_of(track, "scratch"):
        budget = "first" if control.facts["control"]["first_budget"] else "next"
        found.setdefault(budget, []).append(control)
    return found


def _refuse_another_start(track: Track, control: Track, start: Snapshot) -> None:
    """Refuse another snapshot at the beginning than ``start`` of the track."""
    if not _are_equal(control[0], start):
        _refuse(track, control, "begins with another snapshot than the stage of the track did that it repeats")


def _refuse_made_otherwise(track: Track, control: Track) -> None:
    """Refuse what was made by another recipe, or on LLM checkpoints with other weights."""
    kind, factor = control.facts["control"]["kind"], control.facts["control"].get("factor", 1)
    recipe = track.facts.get("recipe", {})
    expected = {**dict.fromkeys(control.training_recipe), **track.training_recipe}
    expected |= {name: fact for name, fact in track.facts.items() if name not in _OWN}
    expected |= {name: recipe[name] * factor for name in _BUDGETS if name in recipe}
    if kind in ("null", "replica") and _WARM_START in recipe:  # the others have one of their own
        expected[_WARM_START] = recipe[_WARM_START]
    made = {**control.facts, **control.facts.get("recipe", {})}
    for name, value in expected.items():
        if made.get(name) != value:
            _refuse(
                track,
                control,
                f"was made by another recipe than {track.path} ({name} is {made.get(name)}, not {value})",
            )
    weights = {s.step: s.metadata["llm"].get("weight_hash") for s in track.whole}
    for snapshot in control if kind != "random" else ():
        had, has = snapshot.metadata["llm"].get("weight_hash"), weights.get(snapshot.step)
        if None not in (had, has) and had != has:
            _refuse(track, control, f"was trained on an LLM checkpoint of step {snapshot.step} with other weights")


def _refuse(track: Track, control: Track, what: str) -> None:
    facts = control.facts["control"]
    options = f"--kind {facts['kind']}"
    if facts["kind"] == "null" and facts["position"] is None:
        options += " --chain true"
    if facts["kind"] in ("null", "replica") and facts["position"] is not None:
        options += f" --positions '[{facts['position']}]'"
    if facts["kind"] == "thinned":
        options += f" --thin {facts['thin']}" + (" --budget total" if facts["factor"] > 1 else "")
    if facts["kind"] == "scratch" and facts["first_budget"]:
        options += " --budget first"
    raise ValueError(
        f"The control {control.path} {what}, so it cannot calibrate it. Remove it and run "
        f"`saetrack control {track.path} {options}`."
    )


def _are_equal(one: Snapshot, other: Snapshot) -> bool:
    """Whether they are the same snapshot: by their metadata and one small tensor, which no two SAEs share."""
    return _facts(one) == _facts(other) and torch.equal(one.tensor("b_dec"), other.tensor("b_dec"))


def _facts(snapshot: Snapshot) -> dict[str, Any]:
    """Its metadata, but for the place in the track, which 0.1.0 wrote there too."""
    return {name: fact for name, fact in snapshot.metadata.items() if name != "position"}
