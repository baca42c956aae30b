"""Putting the page together and writing it: one file, or a file and a folder where one would be too large."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, PackageLoader
from torch.nn.functional import normalize

import saetrack
from saetrack.analysis.outdated import missing
from saetrack.storage import whole_folder, write_text

from . import contexts, features, overview
from .data import COMMANDS, Results
from .pack import pack, smallest_unsigned

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from saetrack.track import Track

MAX_BYTES = 15_000_000
"""A larger page becomes a folder: a browser would hold all of it to show one feature, and no mail would carry it."""

CHUNK = 128
"""Features whose details travel together."""

SCRIPTS = ("data", "charts", "figures", "overview", "table", "text", "feature", "main")


@dataclass(frozen=True)
class WrittenReport:
    """What was written.

    Args:
        path: The page.
        data: The folder that belongs to it, or None when all is in the page.
        size: Bytes of both together.
    """

    path: Path
    data: Path | None
    size: int


@dataclass
class _Parts:
    """The data of one track: what the page opens with, and what it opens when a feature is asked for."""

    core: str
    chunks: list[str] = field(default_factory=list)


def write_report(tracks: Sequence[Track], to: Path, max_bytes: int = MAX_BYTES) -> WrittenReport:
    """Write the report of a track, or of two beside each other.

    Args:
        tracks: One or two, each with at least one snapshot.
        to: The page, ``NAME.html``. One that is there is replaced.
        max_bytes: A larger page keeps its details in a folder ``NAME_files`` beside it.

    Returns:
        Where it is and how large.

    Raises:
        ValueError: If there are no or more than two tracks, a track is empty, or ``to`` is no HTML file.
        FileNotFoundError: If the tokenizer of a track has gone.
    """
    if not 1 <= len(tracks) <= 2:
        raise ValueError(f"A report shows one track or compares two, but {len(tracks)} were given.")
    if to.suffix.lower() != ".html":
        raise ValueError(f"--to is {to}, but the report is one HTML file; give a name that ends in .html.")
    for track in tracks:
        if len(track) == 0:
            raise ValueError(f"{track.path} holds no snapshot yet, so there is nothing to show. Run `saetrack fit`.")
    others = reversed(tracks) if len(tracks) == 2 else [None]
    parts = [_parts(Results(track), track, other) for track, other in zip(tracks, others, strict=True)]
    folder = to.with_name(f"{to.stem}_files")
    page = _render(tracks, parts, folder=None)
    if len(page) <= max_bytes:
        write_text(to, page)
        shutil.rmtree(folder, ignore_errors=True)  # of a larger report that was here before
        return WrittenReport(to, None, to.stat().st_size)
    with whole_folder(folder) as new:
        for number, part in enumerate(parts):
            for place, chunk in enumerate(part.chunks):
                name = f"t{number}-{place}"
                (new / f"{name}.js").write_text(f'saetrackChunk("{name}", "{chunk}");\n', encoding="ascii")
    write_text(to, _render(tracks, parts, folder))
    return WrittenReport(to, folder, sum(p.stat().st_size for p in [to, *folder.iterdir()]))


def _render(tracks: Sequence[Track], parts: list[_Parts], folder: Path | None) -> str:
    assets = files(__package__) / "assets"
    environment = Environment(loader=PackageLoader(__package__, "assets"), autoescape=True, trim_blocks=True)
    scripts = [(assets / "js" / f"{name}.js").read_text("utf-8") for name in SCRIPTS]
    libraries = [(assets / "vendor" / name).read_text("utf-8") for name in ("d3.min.js", "plot.umd.min.js")]
    return environment.get_template("page.html").render(
        title=" and ".join(f"{Path(t.facts['model']).name} · {t.facts['hookpoint']}" for t in tracks),
        style=(assets / "style.css").read_text("utf-8"),
        libraries=libraries,
        script="\n".join(scripts),
        parts=parts,
        folder=folder.name if folder else None,
        version=saetrack.__version__,
    )


def _parts(results: Results, track: Track, other: Track | None) -> _Parts:
    vocabulary = contexts.Vocabulary()
    text = contexts.read_text(results, vocabulary)
    columns, curves = features.columns(results), features.curves(results)
    match = None if other is None else features.match(track, other)
    if match is not None:
        about = "Cosine of its decoder row with the nearest one of the other track, at the last checkpoints; "
        about += f"95 % of random directions stay below {match[2]:.2f}"
        columns.add("match", "In the other track", match[1], about)
    details = {**curves.values, **contexts.looks(results, vocabulary), **({} if text is None else text.contexts)}
    chunks = [
        pack({}, {name: values[a : a + CHUNK] for name, values in details.items()} | _turns(track, a))
        for a in range(0, results.d_sae, CHUNK)
    ]
    arrays: dict[str, NDArray[Any]] = {f"column.{name}": values for name, values in columns.values.items()}
    arrays["alive"] = features.alive(results)
    arrays["life"] = features.life(results)
    if match is not None:
        arrays["match"] = smallest_unsigned(match[0])
    if text is not None:
        arrays |= {"rows": text.rows, "documents": text.documents, "words": text.words}
        arrays |= {"word_numbers": smallest_unsigned(text.word_numbers), "labels": smallest_unsigned(text.labels)}
    facts = {
        "about": _about(track),
        "steps": track.steps,
        "d_sae": results.d_sae,
        "chunk": CHUNK,
        "missing": {name: cls for name, cls in COMMANDS.items() if results.facts(name) is None},
        "sections": overview.sections(results),
        "outdated": results.outdated(),
        "columns": columns.specs,
        "figures": curves.figures,
        "bin_edges": ((results.facts("profile") or {}).get("settings") or {}).get("bin_edges", []),
        "left": 0 if text is None else text.left,
        "vocabulary": vocabulary.texts,
    }
    return _Parts(pack(facts, arrays), chunks)


def _turns(track: Track, start: int) -> dict[str, NDArray[Any]]:
    """Cosines of each feature's decoder row between every two checkpoints, in 1 / 127: ``[features, T, T]`` int8."""
    rows = normalize(track.decoder(range(start, min(start + CHUNK, track.facts["d_sae"]))), dim=-1)  # [T, F, d]
    cosines = np.einsum("sfd,tfd->fst", rows, rows)
    return {"turns": np.rint(127 * cosines.clip(-1, 1)).astype(np.int8)}


def _about(track: Track) -> dict[str, Any]:
    """What was tracked, for the head of the page."""
    facts, last = track.facts, track[-1].metadata
    return {
        "name": str(track.path),
        "model": facts["model"],
        "hookpoint": facts["hookpoint"],
        "missing": missing(track),
        "sae": last["sae"]["class"].rpartition(".")[2],
        "d_in": facts["d_in"],
        "seed": facts.get("seed"),
        "warm_start": last.get("warm_start"),
        "tokens": [snapshot.llm.tokens for snapshot in track],
        "tokens_trained": [snapshot.metadata.get("tokens_trained") for snapshot in track],
        "arguments": last["sae"]["arguments"],
        "facts": {k: v for k, v in facts.items() if k not in ("sae",)},
    }
