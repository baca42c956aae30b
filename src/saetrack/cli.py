"""The command line: ``saetrack fit`` is Lightning's, every other command is a plain function."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, set_parsing_settings

import saetrack
from saetrack.analysis import Analysis, SweepAnalysis
from saetrack.analysis.plugins import discover, list_analyses, load_plugins, name_analyses
from saetrack.analysis.sweep import run_analyses
from saetrack.errors import OneLineErrors
from saetrack.lm import describe_checkpoints, source_from_string
from saetrack.track import Track

PACKAGE = Path(saetrack.__file__).parent
TRACEBACK_VARIABLE = "SAETRACK_TRACEBACK"


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
    pretrain(folder, PretrainConfig(**config))
    _say(describe_checkpoints(source_from_string(str(folder))))


def checkpoints(args: list[str]) -> None:
    """List the LLM checkpoints that a folder or a Hub repository holds."""
    parser = _parser("checkpoints", checkpoints)
    parser.add_argument("source", help="A folder of checkpoints, or a Hub repository such as EleutherAI/pythia-160m.")
    parser.add_argument("--audit", action="store_true", help="Hash the weights: find missing and repeated ones.")
    options = parser.parse_args(args)
    _say(describe_checkpoints(source_from_string(options.source), audit=options.audit))


def analyze(args: list[str]) -> None:
    """Run analyses on a track, each LLM checkpoint loaded once for all of them."""
    parser = _parser("analyze", analyze)
    parser.add_argument("track", type=Path, help="The track, runs/NAME/HOOKPOINT, or runs/NAME if it holds one.")
    parser.add_argument(
        "--analyses",
        type=list[Analysis | SweepAnalysis],
        default=None,
        help="Class names; give the first as `--analyses+=Drift` too. All built-in ones by default.",
    )
    parser.add_argument("--device", default="cpu", help="Where the LLM and the SAE run, e.g. cuda.")
    config = parser.instantiate(parser.parse_args(args))
    if torch.device(config.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {config.device}, but this machine has no GPU that PyTorch can use; use cpu.")
    chosen = name_analyses(config.analyses) if config.analyses else _built_in_analyses()
    track = Track.open(config.track)
    for name, result in run_analyses(track, chosen, device=config.device).items():
        _say(f"{name}: {result.summary}\n  {track.analyses_dir / name}")


def analyses(args: list[str]) -> None:
    """List the analyses: built-in, of installed plugins, and of files in plugins/."""
    _parser("analyses", analyses).parse_args(args)
    _say(list_analyses())


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    command.__name__: command for command in (pretrain, checkpoints, analyze, analyses)
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
        if argv and argv[0] in COMMANDS:
            COMMANDS[argv[0]](argv[1:])
        else:
            from saetrack.training.cli import fit

            fit(args, "; ".join(f"{name}: {_first_line(command)}" for name, command in COMMANDS.items()))
    except (ValueError, OSError, RuntimeError) as error:
        if not _raised_by_us(error) or os.environ.get(TRACEBACK_VARIABLE):
            raise
        sys.stderr.write(f"saetrack: error: {error}\n")
        sys.exit(1)


def _raised_by_us(error: BaseException) -> bool:
    """Whether the error's message is enough: it comes from a check of ours, or it is the file system's own."""
    if isinstance(error, OSError) and error.filename is not None:
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).is_relative_to(PACKAGE)


def _parser(name: str, command: Callable[..., Any]) -> ArgumentParser:
    parser = CommandParser(prog=f"saetrack {name}", description=_first_line(command))
    parser.add_argument("--config", action="config", help="Read options from a file.")
    return parser


def _built_in_analyses() -> dict[str, Analysis | SweepAnalysis]:
    plugins = discover()
    return {
        name: p.cls() for name, p in plugins.items() if p.cls is not None and p.cls.__module__.startswith("saetrack.")
    }


def _first_line(command: Callable[..., Any]) -> str:
    return (command.__doc__ or "").strip().splitlines()[0]


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
