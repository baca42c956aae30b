"""``saetrack fit``: LightningCLI with the parts of saetrack, and what it says at the end."""

from __future__ import annotations

import json
import signal
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

import saetrack
from saetrack.analysis.base import RESULT_FILE
from saetrack.analysis.outdated import command_for, outdated
from saetrack.analysis.sweep import run_analyses
from saetrack.errors import OneLineErrors, is_ours, one_line
from saetrack.pickles import reason
from saetrack.storage import claimed, write_text
from saetrack.terminal import quiet_lightning, shown
from saetrack.track import Track, tracks_in
from saetrack.training.callbacks import AnalyzeTrack, ResumeFile
from saetrack.training.complete import (
    complete_tracks,
    how_to_go_on_without,
    refuse_another_configuration,
    refuse_damage,
)
from saetrack.training.datamodule import ActivationDataModule
from saetrack.training.downloads import HubDownloads
from saetrack.training.module import SAEModule
from saetrack.training.progress import TrackProgressBar
from saetrack.training.scheduler import CheckpointScheduler
from saetrack.training.start import read_start
from saetrack.training.track_logger import TrackLogger
from saetrack.training.tracks import trained

ADMISSIBLE_RISE = 0.5
"""Relative rise of FVU after the warm start up to which features kept 90 % of their identity's ceiling where it was
measured (the density analysis, docs/validation.md)."""


def fit(args: list[str] | None, other_commands: str) -> None:
    """Parse a command line and train.

    Args:
        args: What was typed after ``saetrack``, or None for the process's own arguments.
        other_commands: What ``saetrack --help`` says below Lightning's own command.
    """
    threading.excepthook = _say_in_thread
    try:
        with ExitStack() as held:
            FitCLI(args, SaveTrackConfig, epilog=f"Other commands: {other_commands}", held=held)
    except KeyboardInterrupt:  # while it waits for the first LLM checkpoint; later Lightning takes it
        sys.exit(128 + signal.SIGINT)
    except SIGTERMException:  # Lightning's is a SystemExit that says nothing and means success
        sys.stderr.write("saetrack: stopped by SIGTERM. Go on with the same command and `--ckpt_path last`.\n")
        sys.exit(128 + signal.SIGTERM)


def _say_in_thread(failed: threading.ExceptHookArgs) -> None:
    """Nothing of what TensorBoard's thread could not write: it is raised again where the next is written."""
    if failed.exc_value is None or one_line(failed.exc_value) is None:
        threading.__excepthook__(failed)


class FitParser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser with errors of one line."""


class SaveTrackConfig(SaveConfigCallback):
    """Keeps the resolved configuration in the run's folder, ``config.yaml``."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: the scheduler has not looked whether the folder holds another run's track."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it. Lightning runs this callback after the scheduler, which refuses to harm a track."""
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml`` into the run's folder in one step."""
        path = Path(self.config.scheduler.track_dir) / "config.yaml"
        write_text(path, self.parser.dump(self.config, skip_none=False))


class FitCLI(LightningCLI):
    """LightningCLI with one command, ``fit``, and saetrack's sections in its configuration.

    Args:
        args: What was typed after ``saetrack``, None for the process's own arguments, or a parsed configuration.
        save_config_callback: Keeps the configuration.
        epilog: Last paragraph of the help.
        held: Takes what is to be held until the run ends: the claim on its folder.
    """

    def __init__(
        self,
        args: ArgsType,
        save_config_callback: type[SaveConfigCallback] | None = None,
        epilog: str = "",
        held: ExitStack | None = None,
    ) -> None:
        self._held = held or ExitStack()
        quiet_lightning()
        super().__init__(
            SAEModule,
            ActivationDataModule,
            args=args,
            save_config_callback=save_config_callback,
            save_config_kwargs={"save_to_log_dir": False},
            parser_class=FitParser,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={
                "prog": "saetrack",
                "version": saetrack.__version__,
                "description": "Follow the features of a language model through its training.",
                "epilog": epilog,
            },
            trainer_defaults={
                "max_epochs": -1,  # the scheduler sets the real number, one for each stage
                "reload_dataloaders_every_n_epochs": 1,
                "logger": {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {"save_dir": "runs", "name": "tensorboard", "version": ""},
                },
                "enable_model_summary": False,
                "callbacks": [TrackLogger()],
            },
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only ``fit``: the track is measured at the end of each stage, so there is nothing to validate or test."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the downloads, the scheduler, the resume file and the analyses, and tie what must agree."""
        parser.add_lightning_class_args(HubDownloads, "hub")  # first, for it marks what the scheduler downloads
        parser.add_lightning_class_args(CheckpointScheduler, "scheduler")
        parser.add_lightning_class_args(ResumeFile, "resume")
        parser.add_lightning_class_args(AnalyzeTrack, "analyze")
        parser.link_arguments("scheduler.track_dir", "trainer.default_root_dir", compute_fn=str)
        parser.link_arguments("scheduler.track_dir", "trainer.logger.init_args.save_dir", compute_fn=str)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning's trainer with our progress bar, unless the user wants none."""
        if self.config_init[self.subcommand].trainer.enable_progress_bar is not False:
            self.trainer_defaults["callbacks"].append(TrackProgressBar())
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError) as error:  # it names what it was given
            if is_ours(error):
                raise
            found = reason(error).rstrip("!")
            raise ValueError(f"Lightning cannot make a trainer of these `trainer.` options: {found}.") from error

    def before_fit(self) -> None:
        """Pretrain the LLM if the source asks for it, and say so when the track is complete already."""
        if not self.trainer.fast_dev_run and self.trainer.is_global_zero:  # type: ignore[attr-defined]
            self._held.enter_context(claimed(self._scheduler.track_dir))
            self._leave_if_complete()
        self._find_resume_file(self._scheduler.track_dir)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, TrackLogger):
                callback.hold_loggers(self.trainer)

    def _leave_if_complete(self) -> None:
        data, scheduler = self.datamodule, self._scheduler
        data.source.prepare()
        if data.source.watcher is not None and not data.source.watcher.look().ended:
            return
        wanted = scheduler.wanted(data.source.checkpoints(), read_start(self.model.start, data.hookpoints))
        tracks = complete_tracks(scheduler.track_dir, data.hookpoints, wanted, scheduler.max_rise is not None)
        if not tracks:
            return
        parser = self._subcommand_parser
        now, default = (
            yaml.safe_load(parser.dump(options, skip_none=False, skip_validation=True))
            for options in (self.config[self.subcommand], parser.get_defaults())
        )
        refuse_another_configuration(scheduler.track_dir, tracks.values(), wanted, now, default)
        scheduler.tracks = tracks
        ran = {name for track in tracks.values() for name in self._run_missing_analyses(track)}
        did = f"ran {', '.join(sorted(ran))}, which had no result yet" if ran else "nothing was changed"
        self._say_summary(f"The track in {scheduler.track_dir} is complete; {did}.")
        sys.exit(0)

    def _run_missing_analyses(self, track: Track) -> list[str]:
        """Run the configured analyses that a killed run did not come to, and give their names."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        asked = next(c for c in callbacks if isinstance(c, AnalyzeTrack)).analyses
        missing = {name: a for name, a in asked.items() if not _is_result_of(track, track.analyses_dir / name)}
        if not missing:
            return []
        with shown(f"Analysing {track.facts['hookpoint']}", "analyses and LLM checkpoints to do") as progress:
            results = run_analyses(track, missing, device=self.trainer.strategy.root_device, progress=progress)
        for callback in callbacks:
            if isinstance(callback, TrackLogger):
                callback.log_results(self.trainer, track, results)
        for log in self.trainer.loggers:
            log.finalize("success")
        return list(results)

    def after_fit(self) -> None:
        """Say what was made and where to look."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run and self.trainer.state.finished:  # type: ignore[attr-defined]
            self._say_summary("")

    @property
    def _scheduler(self) -> CheckpointScheduler:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return next(c for c in callbacks if isinstance(c, CheckpointScheduler))

    def _find_resume_file(self, track_dir: Path) -> None:
        """Make ``--ckpt_path last`` the run's resume file; Lightning would look in its own folders."""
        options = self.config_init[self.subcommand]
        options.weights_only = True  # the one file here that is unpickled may hold tensors and plain values only
        if options.ckpt_path is None:
            return
        last = options.ckpt_path == "last"
        path = ResumeFile.path(track_dir) if last else Path(options.ckpt_path)
        if not path.is_file() and (not last or any(trained(Track.open(track)) for track in tracks_in(track_dir))):
            go_on = how_to_go_on_without(track_dir) if last else "Give `--ckpt_path last`, or leave it out to begin."
            raise FileNotFoundError(f"`--ckpt_path {options.ckpt_path}` needs {path}, which is not there. {go_on}")
        refuse_damage(path, track_dir)
        options.ckpt_path = str(path) if path.is_file() else None

    @property
    def _subcommand_parser(self) -> LightningArgumentParser:
        return self._parser(self.subcommand)

    def _say_summary(self, headline: str) -> None:
        lines = [headline] if headline else []
        for path in tracks_in(self._scheduler.track_dir):
            track = Track.open(path)
            lines += ["", f"{path} ({track.facts['hookpoint']})", snapshot_table(track)]
            if wide := wide_gaps(track.metrics()):
                lines.append(
                    f"  Wide gaps: entering LLM step {', '.join(map(str, wide))} the FVU rose by over "
                    f"{ADMISSIBLE_RISE:.0%}, warm start included. Many features do not keep their meaning over such a "
                    "gap (docs/validation.md): visit LLM checkpoints in between if there are any."
                )
            found = sorted(p for p in track.analyses_dir.glob(f"*/{RESULT_FILE}") if p.parent.name[0] != ".")
            lines += [f"  {_finding(track, p)}" for p in found]
            lines += [f"  Their tables and figures: {track.analyses_dir}"] if found else []
            lines += [] if found else [f"  No analyses yet: saetrack analyze {path}"]
            lines += ["", f"Look at it:  saetrack report {path}"]
        board = [log for log in self.trainer.loggers if isinstance(log, TensorBoardLogger)]
        lines += [f"             tensorboard --logdir {log.log_dir}"] if (log := next(iter(board), None)) else []
        sys.stdout.write("\n".join(lines) + "\n")


def _finding(track: Track, result: Path) -> str:
    """What an analysis found; of one that is not of the track as it is now, how to run it again."""
    name, facts = result.parent.name, json.loads(result.read_text(encoding="utf-8"))
    old = outdated(track, facts["settings"])
    if old is None:
        return f"{name}: {facts['summary']}"
    return f"{name}: old, {old}. Run `{command_for(track, name)}`."


def _is_result_of(track: Track, result: Path) -> bool:
    """Whether an analysis' result is there and is of the track as it is now, not from before it was extended."""
    try:
        settings = json.loads((result / RESULT_FILE).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, LookupError, TypeError):  # none, or damaged: it is made again
        return False
    return outdated(track, settings) is None


def wide_gaps(metrics: pd.DataFrame) -> list[int]:
    """LLM steps that were entered over a gap wider than features are known to survive.

    Args:
        metrics: As ``Track.metrics`` gives them.

    Example:
        >>> fvu = {"fvu_before": [0.9, 0.12, 0.3], "fvu": [0.1, 0.1, 0.1]}
        >>> wide_gaps(pd.DataFrame({"step": [0, 4, 64], "from_step": [float("nan"), 0, 4], **fvu}))
        [64]
    """
    rise = metrics["fvu_before"] / metrics["from_step"].map(metrics.set_index("step")["fvu"]) - 1
    return [int(step) for step in metrics.loc[rise > ADMISSIBLE_RISE, "step"]]


def snapshot_table(track: Track) -> str:
    """The snapshots of a track as a plain text table, one line each."""
    metrics = track.metrics()
    began = metrics["from_step"].map(lambda step: "-" if pd.isna(step) else f"{step:,.0f}")
    columns = {
        "LLM step": metrics["step"].map("{:,}".format),
        **({} if track.is_forward_chain else {"from step": began}),
        "FVU before": metrics["fvu_before"].map("{:.3f}".format),
        "FVU after": metrics["fvu"].map("{:.3f}".format),
        "L0": metrics["l0"].map("{:.1f}".format),
        "dead": metrics["dead_share"].map("{:.1%}".format),
        "CE recovered": metrics["ce_recovered_zero"].map(lambda share: "-" if pd.isna(share) else f"{share:.1%}"),
    }
    return pd.DataFrame(columns).to_string(index=False)
