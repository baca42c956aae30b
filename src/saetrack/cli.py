"""The command line: ``saetrack fit`` is Lightning's, every other command is a plain function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, set_parsing_settings
from safetensors import SafetensorError

from saetrack.analysis import AnalysisResult, AnyAnalysis
from saetrack.analysis.plugins import discover, list_analyses, load_plugins, name_analyses
from saetrack.analysis.sweep import run_analyses
from saetrack.errors import OneLineErrors, one_line, said_by_rank_zero, wants_traceback
from saetrack.exchange import EXPORT_FORMATS, ImportedFacts, export_track, import_map, import_sae
from saetrack.hub import push_folder
from saetrack.lm import describe_checkpoints, source_from_string
from saetrack.terminal import quiet_lightning, shown
from saetrack.track import Track


class CommandParser(OneLineErrors, ArgumentParser):
    """The parser of every command but ``fit``, with errors of one line."""


def pretrain(args: list[str]) -> None:
    """Train a small GPT-NeoX and keep its checkpoints as a series to follow."""
    from saetrack.lm.pretrain import PretrainConfig, pretrain

    parser = _parser("pretrain", pretrain)
    parser.add_argument("folder", type=Path, help="Where the folders step0, step1, ... are written.")
    parser.add_class_arguments(PretrainConfig, as_group=False)
    config = parser.instantiate(parser.parse_args(args)).as_dict()
    config.pop("config")
    folder = config.pop("folder")
    quiet_lightning()
    pretrain(folder, PretrainConfig(**config))
    _say(describe_checkpoints(source_from_string(str(folder))))


def checkpoints(args: list[str]) -> None:
    """List the LLM checkpoints that a folder or a Hub repository holds."""
    parser = _parser("checkpoints", checkpoints)
    parser.add_argument("source", help="A folder of checkpoints, or a Hub repository such as EleutherAI/pythia-160m.")
    parser.add_argument("--audit", action="store_true", help="Hash the weights: find missing and repeated ones.")
    parser.add_argument(
        "--select", default="all", help="Which of them: all, every:10, log:20, dense:512+every:10, tokens:1B-10B, ..."
    )
    parser.add_argument("--ingredient", type=int, default=None, help="Which of parallel branches of a Hub repository.")
    options = parser.parse_args(args)
    source = source_from_string(options.source, options.ingredient)
    _say(describe_checkpoints(source, audit=options.audit, select=options.select))


def analyze(args: list[str]) -> None:
    """Run analyses on a track, each LLM checkpoint loaded once for all of them."""
    parser = _parser("analyze", analyze)
    parser.add_argument("track", type=Path, help="The track, runs/NAME/HOOKPOINT, or runs/NAME if it holds one.")
    parser.add_argument(
        "--analyses",
        type=list[AnyAnalysis],
        default=None,
        help="Class names; give the first as `--analyses+=Drift` too. All built-in ones by default.",
    )
    parser.add_argument("--device", default="cpu", help="Where the LLM and the SAE run, e.g. cuda.")
    parser.add_argument(
        "--only_kept",
        type=bool,
        default=False,
        help="Count features only while they kept their identity, by the result of Identity; written to NAME-kept.",
    )
    config = parser.instantiate(parser.parse_args(args))
    _refuse_device(config.device)
    track = Track.open(config.track)
    chosen = name_analyses(config.analyses) if config.analyses else _built_in_analyses(len(track.distinct()))
    if config.only_kept and not config.analyses:
        chosen = {name: analysis for name, analysis in chosen.items() if analysis.restrictable}
    saved: dict[str, AnalysisResult] = {}
    options = {"device": config.device, "only_kept": config.only_kept, "finished": saved.__setitem__}
    try:
        with shown(f"Analysing {track.facts['hookpoint']}", "analyses and LLM checkpoints to do") as progress:
            run_analyses(track, chosen, progress=progress, **options)
    finally:  # another one may have failed, or a person have had enough
        for name in filter(saved.get, chosen):
            _say(f"{name}: {saved[name].summary}\n  {track.analyses_dir / name}{'-kept' if config.only_kept else ''}")


def control(args: list[str]) -> None:
    """Train controls of a track: what training once more, and nothing else, does to its features."""
    from saetrack.training.control import control_table, run_controls
    from saetrack.training.control_plan import ControlSettings

    parser = _parser("control", control)
    parser.add_argument("track", type=Path, help="The track, runs/NAME/HOOKPOINT, or runs/NAME if it holds one.")
    parser.add_class_arguments(ControlSettings, as_group=False)
    config = parser.instantiate(parser.parse_args(args)).as_dict()
    config.pop("config")
    track = Track.open(config.pop("track"))
    run_controls(track, ControlSettings(**config))
    _say(f"{control_table(track)}\n  {track.path / 'controls'}")


def analyses(args: list[str]) -> None:
    """List the analyses: built-in, of installed plugins, and of files in plugins/."""
    _parser("analyses", analyses).parse_args(args)
    _say(list_analyses())


def report(args: list[str]) -> None:
    """Write one HTML page that shows a track, or two beside each other; it opens from disk."""
    from saetrack.report import write_report
    from saetrack.report.data import Results

    parser = _parser("report", report)
    parser.add_argument("tracks", type=Path, nargs="+", help="A track, runs/NAME/HOOKPOINT, or two to compare.")
    parser.add_argument(
        "--to", type=Path | None, default=None, help="The page; report.html in the first track if not given."
    )
    options = parser.parse_args(args)
    tracks = [Track.open(path) for path in options.tracks]
    written = write_report(tracks, options.to or tracks[0].path / "report.html")
    _say(f"{written.path} ({written.size / 1e6:.1f} MB)")
    for name, old in (item for track in tracks for item in Results(track).outdated().items()):
        _say(f"Its {name} is old, {old['text']}. Run `{old['command']}`, then write the report again.")
    if written.data:
        _say(f"It is too large for one file: keep the folder {written.data} beside it.")


def export(args: list[str]) -> None:
    """Write a track's SAEs for another library, or as one folder to share."""
    parser = _parser("export", export)
    parser.add_argument("track", help="The track, runs/NAME/HOOKPOINT or runs/NAME, or hf://owner/name.")
    parser.add_argument("--format", choices=EXPORT_FORMATS, required=True, help="The library that shall open them.")
    parser.add_argument("--step", default="all", help="The LLM step of one snapshot, or all.")
    parser.add_argument("--to", type=Path, required=True, help="The folder to write.")
    parser.add_argument("--push", default=None, help="Upload the folder as this repository, owner/name.")
    options = parser.parse_args(args)
    for folder in export_track(Track.open(options.track), options.format, str(options.step), options.to, options.push):
        _say(str(folder))
    if options.push is not None:
        _say(push_folder(options.to, options.push))


def import_(args: list[str]) -> None:
    """Make a track of SAEs that another library trained."""
    parser = _parser("import", import_)
    parser.add_argument("source", help="A folder or file of an SAE, a model_save_map*.json, or owner/name on the Hub.")
    parser.add_argument("--as", type=Path, required=True, help="The track to make, runs/NAME/HOOKPOINT.")
    parser.add_argument("--steps", type=dict[int, int] | None, help="For a map: the LLM step of each index, as json.")
    parser.add_class_arguments(ImportedFacts, as_group=False)
    options = parser.parse_args(args).as_dict()
    facts = ImportedFacts(**{field: options[field] for field in ImportedFacts.__dataclass_fields__})
    source, track = options["source"], options["as"]
    is_map = Path(source).name.startswith("model_save_map") and source.endswith(".json")
    if options["steps"] is not None and not is_map:
        raise ValueError(f"--steps is for a model_save_map*.json, but {source} is none; give `--step` instead.")
    made = import_map(Path(source), track, facts, options["steps"]) if is_map else import_sae(source, track, facts)
    _say(f"{made.path}: {len(made)} snapshot{'s' if len(made) > 1 else ''} of {made.facts['sae']['class']}")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    command.__name__.rstrip("_"): command
    for command in (pretrain, checkpoints, control, analyze, report, analyses, export, import_)
}


def main(args: list[str] | None = None) -> None:
    """Run a command.

    Args:
        args: What was typed after ``saetrack``; by default the process's own arguments.
    """
    argv = sys.argv[1:] if args is None else args
    try:
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        load_plugins()  # before any parser exists: short class names resolve among imported classes only
        if not argv or (not argv[0].startswith("-") and argv[0] not in ("fit", *COMMANDS)):
            typed = f"there is no command {argv[0]!r}" if argv else "no command was given"
            sys.stderr.write(f"saetrack: error: {typed}; expected fit, {', '.join(COMMANDS)}. Try `saetrack --help`.\n")
            sys.exit(2)
        if argv[0] in COMMANDS:
            OneLineErrors.command = argv[0]
            COMMANDS[argv[0]](argv[1:])
        else:
            from saetrack.training.cli import fit

            OneLineErrors.command = "fit"
            fit(args, "; ".join(f"{name}: {_first_line(command)}" for name, command in COMMANDS.items()))
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        if wants_traceback(error):
            raise
        if not said_by_rank_zero():
            sys.stderr.write(f"saetrack: error: {one_line(error)}\n")
        sys.exit(1)


def _refuse_device(device: str) -> None:
    try:
        asked = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"--device is {device!r}, which PyTorch does not know; expected cpu, cuda or cuda:1."
        ) from None
    if asked.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {device}; expected cpu, cuda or cuda:1.")
    gpus = torch.cuda.device_count()
    if asked.type == "cuda" and (asked.index or 0) >= gpus:
        there = f"only {gpus}, counted from 0" if gpus else "no GPU that PyTorch can use"
        raise ValueError(f"--device is {device}, but this machine has {there}; use {'cuda' if gpus else 'cpu'}.")


def _parser(name: str, command: Callable[..., Any]) -> ArgumentParser:
    parser = CommandParser(prog=f"saetrack {name}", description=_first_line(command))
    parser.add_argument("--config", action="config", help="Read options from a file.")
    return parser


def _built_in_analyses(snapshots: int) -> dict[str, AnyAnalysis]:
    """Those that a track of so many snapshots is long enough for."""
    built_in = {name: p.cls for name, p in discover().items() if p.cls and p.cls.__module__.startswith("saetrack.")}
    return {name: cls() for name, cls in built_in.items() if snapshots >= cls.min_snapshots}


def _first_line(command: Callable[..., Any]) -> str:
    return (command.__doc__ or "").strip().splitlines()[0]


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
