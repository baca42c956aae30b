"""Which controls a track should have: what each repeats, from which snapshot, on which LLM checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saetrack.lm.checkpoints import LLMCheckpoint
from saetrack.track import Snapshot, Track
from saetrack.training.warm_start import WarmStart

Kind = Literal["null", "replica", "scratch", "thinned", "random"]
Budget = Literal["next", "first", "total"]


@dataclass(frozen=True)
class ControlSettings:
    """What `saetrack control` is asked for."""

    kind: Kind
    """null: the snapshot before a stage, once more on its own LLM checkpoint; replica: once more on that of the stage,
    as the track did; scratch: fresh SAEs; thinned: the whole series again with only some of its LLM checkpoints;
    random: a fresh SAE, with the tokens of the first stage, on an LLM of the same architecture that was never trained.
    All with another order of the data."""
    replicas: int = 3
    """Tracks of each control."""
    positions: list[int] | None = None
    """Stages to repeat, or where scratch SAEs are trained: the numbers with which the snapshots' folders begin. By
    default four (five), spread over the track."""
    chain: bool = False
    """For null: as many null steps as the track has stages, each from the one before, beginning with its first
    snapshot, instead of single ones."""
    thin: int = 2
    """For thinned: every so manieth snapshot counted from the last, and the first. 1 repeats the whole series."""
    budget: Budget = "next"
    """next: a stage has the tokens of the track's later ones; first, for scratch: those of its first; total, for
    thinned: `thin` times as many, so that the whole series costs the same."""
    warm_start: WarmStart | None = None
    """For thinned: another warm start than the track's."""

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ValueError(f"--replicas is {self.replicas}; it must be at least 1.")
        if self.thin < 1:
            raise ValueError(f"--thin is {self.thin}; it must be at least 1, which takes every LLM checkpoint.")
        if self.chain and (self.kind != "null" or self.positions is not None):
            raise ValueError(
                f"--chain is a null chain through the whole track; it goes with --kind null and without --positions, "
                f"but --kind is {self.kind} and --positions {self.positions}."
            )
        allowed = {"next", *({"scratch": ["first"], "thinned": ["total"]}.get(self.kind, []))}
        if self.budget not in allowed:
            raise ValueError(
                f"--budget is {self.budget}, but a {self.kind} control can have {' or '.join(sorted(allowed))}: "
                "first is for scratch, total for thinned."
            )
        if self.kind == "thinned" and self.positions is not None:
            raise ValueError(
                f"--positions is {self.positions}, but a thinned series is chosen by --thin; leave it out."
            )
        if self.kind == "random" and self.positions is not None:
            raise ValueError(f"--positions is {self.positions}, but a random LLM has no training; leave it out.")
        if self.kind != "thinned" and self.warm_start is not None:
            raise ValueError(f"--warm_start is for --kind thinned; a {self.kind} control has the track's.")


@dataclass(frozen=True)
class Control:
    """What is repeated. Its replicas are tracks of their own, ``controls/NAME-0`` and so on.

    Args:
        name: Their common name, such as ``null-0003``.
        kind: As in :class:`ControlSettings`.
        position: Number of the track's stage that is repeated; None where it is not one stage.
        start: The snapshot that it begins with, as its own position 0; None for ``scratch``.
        checkpoints: LLM checkpoint of every snapshot of the control, that of ``start`` among them.
        first_budget: Whether a stage has the tokens and the learning rate of the track's first.
        thin: Of ``thinned``, how many stages of the track one of its stages stands for.
        factor: How many times the track's tokens a stage has.
        warm_start: None for that of the track.
        llm_seed: Of ``random``, the seed of the LLM's weights.
    """

    name: str
    kind: Kind
    position: int | None
    start: Snapshot | None
    checkpoints: tuple[LLMCheckpoint, ...]
    first_budget: bool = False
    thin: int = 1
    factor: int = 1
    warm_start: WarmStart | None = None
    llm_seed: int | None = None


def plan_controls(track: Track, settings: ControlSettings) -> list[Control]:
    """The controls that a track should have.

    Args:
        track: The track to calibrate.
        settings: What is asked for.

    Returns:
        The controls. That of kind ``random`` has the LLM checkpoint whose architecture is taken: each of its replicas
        has an LLM of its own.

    Raises:
        ValueError: If the track is too short, a position is not in it, or a control of the whole series is asked for
            and the track was not trained forward in one go.
    """
    track = track.distinct()  # between LLM checkpoints of equal weights there is no stage to repeat
    if settings.kind == "random" and len(track):
        return [Control("random", "random", None, None, (track[-1].llm,), first_budget=True, warm_start="scratch")]
    if len(track) < 2:
        raise ValueError(f"{track.path} has {len(track)} snapshots; a control repeats a stage between two of them.")
    llms, kind = [snapshot.llm for snapshot in track], settings.kind
    if (kind == "thinned" or settings.chain) and not track.is_forward_chain:
        raise ValueError(
            f"{track.path} was not trained forward in one go, from each LLM step to the next, so there is no series "
            f"that a {'null chain' if settings.chain else 'thinned control'} could repeat; take null or replica "
            "controls of single stages."
        )
    if kind == "thinned":
        return [_thinned(track, llms, settings)]
    if settings.chain:
        return [Control("null-chain", kind, None, track[0], (llms[0],) * len(track))]
    if kind == "scratch":
        chosen = tuple(s.llm for s in _chosen(track, list(track), settings.positions, count=5))
        first = settings.budget == "first"
        return [Control(f"scratch-{settings.budget}", kind, None, None, chosen, first, warm_start="scratch")]
    began = {snapshot: before for snapshot in track if (before := track.began_from(snapshot)) is not None}
    controls = []
    for snapshot in _chosen(track, list(began), settings.positions, count=4):
        before = began[snapshot]
        checkpoints = before.llm, (before if kind == "null" else snapshot).llm
        controls.append(Control(f"{kind}-{snapshot.number:04d}", kind, snapshot.number, before, checkpoints))
    return controls


def _thinned(track: Track, llms: list[LLMCheckpoint], settings: ControlSettings) -> Control:
    """The series from its first snapshot, over every ``thin``-th LLM checkpoint counted from the last."""
    chosen = sorted({0, *range(len(track) - 1, 0, -settings.thin)})
    name = f"thinned-{settings.thin}-{settings.budget}"
    if settings.warm_start is not None:
        name += f"-{settings.warm_start}"
    factor = settings.thin if settings.budget == "total" else 1
    checkpoints = tuple(llms[i] for i in chosen)
    return Control(
        name, "thinned", None, track[0], checkpoints, thin=settings.thin, factor=factor, warm_start=settings.warm_start
    )


def _chosen(track: Track, possible: list[Snapshot], asked: list[int] | None, count: int) -> list[Snapshot]:
    """The snapshots of the numbers asked for, or at most ``count`` spread evenly from the first to the last."""
    if asked is None:
        last = len(possible) - 1
        return [possible[i] for i in sorted({round(i * last / (count - 1)) for i in range(count)})]
    by_number = {snapshot.number: snapshot for snapshot in possible}
    for number in asked:
        if number not in by_number:
            known = ", ".join(f"{s.number} (step {s.step})" for s in possible)
            raise ValueError(
                f"--positions names {number}, but such a control of {track.path} can be at {known}, the numbers of the "
                "snapshots' folders."
            )
    return [by_number[number] for number in sorted(set(asked))]
