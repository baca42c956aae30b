"""The Lightning side of pretraining: batches, model and loss, and the callbacks that write the series."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.utils import logging as transformers_logging

from saetrack.lm.pretrain_config import PretrainConfig, learning_rate_factor, rows_of_step
from saetrack.lm.tokens import TokenRows
from saetrack.storage import whole_folder, write_json
from saetrack.terminal import Display, duration, plain_console, show_on

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RESUME_EVERY = 100  # steps
_LOSS_ROWS = 4
_EAGER_UP_TO = 256  # tokens of context


class TokenBatches:
    """The batches of all steps, in order.

    Its position is saved in the resume file; without one Lightning would start a resumed loader from its beginning.

    Args:
        rows: The training split.
        config: Seed, batch size and number of steps.
    """

    def __init__(self, rows: TokenRows, config: PretrainConfig) -> None:
        self._rows = rows
        self._config = config
        self._position = 0

    def __len__(self) -> int:
        return self._config.steps

    def __iter__(self) -> Iterator[Tensor]:
        tokens = self._rows.tokens
        while self._position < len(self):
            batch = tokens[rows_of_step(self._position, len(tokens), self._config)]
            self._position += 1
            yield torch.from_numpy(batch.astype(np.int64))

    def state_dict(self) -> dict[str, int]:
        """The step whose batch comes next."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved position."""
        self._position = state["position"]


class PretrainData(pl.LightningDataModule):
    """Gives Lightning the batches of the series.

    Args:
        rows: The training split.
        config: Seed, batch size and number of steps.
    """

    def __init__(self, rows: TokenRows, config: PretrainConfig) -> None:
        super().__init__()
        self._rows = rows
        self._config = config

    def train_dataloader(self) -> TokenBatches:
        """A new loader at step 0; Lightning moves it when it resumes."""
        return TokenBatches(self._rows, self._config)


class PretrainModule(pl.LightningModule):
    """A GPT-NeoX with seeded initial weights, its loss and its optimizer.

    Args:
        config: Sizes, learning rate, seed.
    """

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        self._config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.llm = GPTNeoXForCausalLM(_llm_config(config))
        self.llm.train()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean next-token cross entropy of a batch `[batch, context]`, in nats."""
        hidden = self.llm.base_model(batch, use_cache=False).last_hidden_state[:, :-1]  # [batch, context - 1, d_model]
        unembed = self.llm.get_output_embeddings()
        # A few rows at a time: logits of the whole batch fall out of the cache and cost a tenth of the step.
        losses = [
            cross_entropy(unembed(h).flatten(0, 1), t.flatten(), reduction="sum")
            for h, t in zip(torch.split(hidden, _LOSS_ROWS), torch.split(batch[:, 1:], _LOSS_ROWS), strict=True)
        ]
        return torch.stack(losses).sum() / batch[:, 1:].numel()

    def configure_optimizers(self) -> Any:
        """AdamW under a warmup-stable-decay schedule."""
        optimizer = torch.optim.AdamW(
            self.llm.parameters(),
            lr=self._config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=self._config.weight_decay,
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, self._config))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _llm_config(config: PretrainConfig) -> GPTNeoXConfig:
    return GPTNeoXConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        intermediate_size=4 * config.d_model,
        max_position_embeddings=config.context_size,
        bos_token_id=0,
        eos_token_id=0,
        # On a CPU and at this length, plain matrix products are faster than the fused kernel; far above it they need
        # memory that grows with the square of the length.
        attn_implementation="eager" if config.context_size <= _EAGER_UP_TO else "sdpa",
    )


class SeriesWriter(Checkpoint):
    """Writes the checkpoints of the series and the resume file. As a `Checkpoint`, Lightning runs it last."""

    def __init__(self, folder: Path, config: PretrainConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._folder = folder
        self._config = config
        self._tokenizer = tokenizer
        self._steps = set(config.checkpoint_steps)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the weights that training starts from."""
        if trainer.global_step == 0:
            self._write(pl_module.llm, 0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """Write what is due after this step.

        Raises:
            RuntimeError: If something is due and the loss is NaN or infinite.
        """
        step = trainer.global_step
        resumable = step % _RESUME_EVERY == 0
        if not resumable and step not in self._steps:
            return
        if not torch.isfinite(outputs["loss"]):
            raise RuntimeError(
                f"The loss of step {step} is {outputs['loss'].item()}. Checkpoints up to the last one are kept; start "
                f"again in another folder with a learning_rate below {self._config.learning_rate}."
            )
        if step in self._steps:
            self._write(pl_module.llm, step)
        if resumable:
            self._write_resume_file(trainer)

    def _write(self, llm: GPTNeoXForCausalLM, step: int) -> None:
        folder = self._folder / f"step{step}"
        if folder.is_dir():  # a run that was stopped after it wrote this has equal weights here
            return
        with whole_folder(folder) as unfinished, _no_transformers_bars():
            llm.save_pretrained(unfinished)
            self._tokenizer.save_pretrained(unfinished)
            tokens = step * self._config.batch_size * self._config.context_size
            # As Hugging Face's Trainer names them, so that one reader serves both.
            write_json(unfinished / "trainer_state.json", {"global_step": step, "num_input_tokens_seen": tokens})

    def _write_resume_file(self, trainer: pl.Trainer) -> None:
        folder = self._folder / "resume"
        folder.mkdir(exist_ok=True)
        trainer.save_checkpoint(folder / ".last.ckpt")
        (folder / ".last.ckpt").replace(folder / "last.ckpt")


@contextmanager
def _no_transformers_bars() -> Iterator[None]:
    """Keep the bar that `save_pretrained` shows for a fraction of a second from breaking ours."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    yield
    if shown:
        transformers_logging.enable_progress_bar()


class LossBar(ProgressBar):
    """Loss in nats, speed and the time left, read only when they are shown: `self.log` costs time in every step.

    Args:
        every_seconds: Seconds between two lines where there is no terminal.
    """

    def __init__(self, every_seconds: float = 30.0) -> None:
        super().__init__()
        self._every_seconds = every_seconds
        self._display: Display | None = None
        self._enabled = True

    def enable(self) -> None:
        """Speak; Lightning asks for it."""
        self._enabled = True

    def disable(self) -> None:
        """Be silent."""
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock and the bar."""
        self._began = self._said = time.monotonic()
        self._first = trainer.global_step  # of a run that goes on
        if self._enabled:
            self._display = show_on(plain_console(), self._every_seconds)
            self._display.begin("Pretraining the LLM", int(trainer.num_training_batches), "steps")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """Say how it goes, when it is time."""
        now = time.monotonic()
        if self._display is not None and now - self._said >= self._display.between:
            self._said = now
            done, total = trainer.global_step, int(trainer.num_training_batches)
            pace = (now - self._began) / (done - self._first)
            loss, speed = outputs["loss"].item(), batch.numel() / pace
            left = duration((total - done) * pace)
            self._display.show(
                done, f"step {done} of {total}, loss {loss:.3f} nats, {speed:,.0f} tokens/s, {left} left"
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the bar away."""
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take the bar away, so that the error stands alone."""
        self._stop()

    def _stop(self) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None
