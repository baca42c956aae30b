"""Reading a command as saetrack reads it, with every option, and doing nothing."""

import contextlib
import dataclasses
import io
from functools import cache
from typing import Any
from unittest.mock import patch

from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from saetrack.analysis.plugins import load_plugins
from saetrack.cli import COMMANDS, CommandParser, main
from saetrack.lm.pretrain import PretrainConfig
from saetrack.lm.selection import Selection
from saetrack.training.cli import FitCLI
from saetrack.training.control_plan import ControlSettings


class Parsed(Exception):  # noqa: N818 - nothing is wrong
    """What a parser made of a command, thrown so that the command itself is not run."""


@cache
def fit_parser() -> LightningArgumentParser:
    """The parser of ``saetrack fit``."""
    load_plugins()
    set_parsing_settings(docstring_parse_attribute_docstrings=True)

    def stop(cli: FitCLI, parser: LightningArgumentParser, args: Any) -> None:
        raise Parsed(parser)

    with patch.object(FitCLI, "parse_arguments", stop):
        try:
            FitCLI(None)
        except Parsed as parsed:
            parser: LightningArgumentParser = parsed.args[0]
    return parser


def complaint(words: list[str]) -> str | None:
    """What saetrack says against a command; None where it would run it.

    Every option is parsed, and every object of the configuration but the Trainer is made, so that a wrong value is
    found as well as a wrong name.

    Args:
        words: As typed, without ``saetrack``.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            if words[0] == "fit":
                fit_parser().instantiate_classes(fit_parser().parse_args(words))
            else:
                _parse_other(words)
    except SystemExit as stopped:
        return said.getvalue() if stopped.code else None
    except ValueError as error:
        return str(error)
    return None


def _parse_other(words: list[str]) -> None:
    parse = CommandParser.parse_args

    def stop(parser: CommandParser, *args: Any, **options: Any) -> None:
        raise Parsed(parser.instantiate(parse(parser, *args, **options)))

    with patch.object(CommandParser, "parse_args", stop):
        try:
            main(words)
        except Parsed as parsed:
            _make(words[0], parsed.args[0].as_dict())


def _make(command: str, options: dict[str, Any]) -> None:
    """The objects that a command makes of its options itself, for they refuse values too."""
    if command == "checkpoints":
        Selection(options["select"])
    settings = {"control": ControlSettings, "pretrain": PretrainConfig}.get(command)
    if settings is not None:
        settings(**{field.name: options[field.name] for field in dataclasses.fields(settings)})


@cache
def options() -> frozenset[str]:
    """The names of all options of all commands, without their dashes."""
    parsers = [fit_parser()._subcommands_action._name_parser_map["fit"]]

    def keep(parser: CommandParser, *args: Any, **given: Any) -> None:
        parsers.append(parser)
        raise Parsed

    with patch.object(CommandParser, "parse_args", keep):
        for command in COMMANDS.values():
            with contextlib.suppress(Parsed):
                command([])
    return frozenset(name.lstrip("-") for p in parsers for name in p._option_string_actions)
