"""The training loop of each package, from rows of tokens to a trained SAE, with the time of its middle.

Each is built anew in every round. Its first steps are not timed: they fill buffers and warm up. Saving, logging and
evaluation are off or outside of what is timed, in all of them.
"""

import io
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from measuring import Timing
from peers import patched_top_k
from pythia_shape import CONTEXT, data, load
from torch import Tensor

from saetrack.sae import Kernels, TopKSAE
from saetrack.training import CheckpointScheduler, OptimizerSettings, ResumeFile, SAEModule


@dataclass
class Shape:
    """What all loops share.

    Args:
        folder: The LLM and its rows of tokens, as `pythia_shape.make` leaves them.
        d_sae: Latents.
        k: Active latents.
        batch: Activations in a step; one forward of the LLM gives as many.
        layer: Whose output is read.
        device: Where the LLM runs and the SAE is trained.
    """

    folder: Path
    d_sae: int = 16_384
    k: int = 32
    batch: int = 4096
    layer: int = 3
    device: str = "cpu"

    @property
    def rows_per_batch(self) -> int:
        """Token rows in a step."""
        return self.batch // CONTEXT


@dataclass
class Watch:
    """When a loop began each of its steps: wall and processor time.

    Args:
        first: Number of the look from which on time is taken; there a GPU is waited for, and at the last.
        last: Number of the look up to which.
    """

    first: int
    last: int
    times: list[tuple[float, float]] = field(default_factory=list)

    def look(self) -> None:
        """A step begins, or the last has ended."""
        if torch.cuda.is_available() and len(self.times) in (self.first, self.last):
            torch.cuda.synchronize()
        self.times.append((time.perf_counter(), time.process_time()))

    def add_to(self, timing: Timing) -> None:
        """Seconds for each step between the two looks."""
        (wall, cpu), (wall_end, cpu_end) = self.times[self.first], self.times[self.last]
        timing.wall.append((wall_end - wall) / (self.last - self.first))
        timing.cpu.append((cpu_end - cpu) / (self.last - self.first))


class StepEnds(Callback):
    """Looks at the clock after every step of a fit, and before the first."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before the first."""
        if batch_idx == 0:
            self.watch.look()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After each."""
        self.watch.look()


def ours(
    shape: Shape,
    timing: Timing,
    llm_dtype: str = "float32",
    layers: tuple[int, ...] = (),
    batches: int = 2,
    kernels: Kernels = "pytorch",
) -> None:
    """A stage of ``saetrack fit``: DataModule, module, scheduler and Lightning's loop.

    On a CPU it is two chunks long, and the second is timed, its harvest included. On a GPU the harvest of a chunk runs
    beside the training on the one before, so there is a third chunk, whose harvest falls into the time of the second.

    Args:
        shape: What to train.
        timing: Takes the seconds of a step.
        llm_dtype: As ``data.llm_dtype``.
        layers: Whose outputs are read, each with an SAE of its own.
        batches: In a chunk.
        kernels: As ``model.kernels``.
    """
    seed_everything(0, verbose=False)
    hookpoints = [f"gpt_neox.layers.{layer}" for layer in layers or (shape.layer,)]
    ends = StepEnds(Watch(batches, 2 * batches))
    with tempfile.TemporaryDirectory(dir=shape.folder) as run:
        budget = (3 if shape.device == "cuda" else 2) * batches * shape.batch
        module = SAEModule(
            lambda d_in: TopKSAE(d_in, shape.d_sae // d_in, shape.k),
            OptimizerSettings(lr=2e-4, warmup_tokens=0, tolerance=None),
            kernels=kernels,
        )
        Trainer(
            accelerator={"cpu": "cpu", "cuda": "gpu"}[shape.device],
            devices=1,
            max_epochs=-1,
            reload_dataloaders_every_n_epochs=1,
            logger=TensorBoardLogger(run, name="tensorboard", version=""),
            callbacks=[CheckpointScheduler(Path(run) / "track", tokens_first=budget), ResumeFile(), ends],
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=run,
        ).fit(module, data(shape.folder, hookpoints, batches * shape.batch, llm_dtype, shape.batch))
    ends.watch.add_to(timing)


def sparsify(shape: Shape, timing: Timing, dtype: torch.dtype = torch.float32, steps: int = 2) -> None:
    """eai-sparsify's Trainer.fit with Adam; the LLM without its head, as its own command loads it."""
    from sparsify import SparseCoderConfig
    from sparsify.trainer import TrainConfig, Trainer

    watch = Watch(1, steps + 1)

    class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
        """As its MemmapDataset; looks at the clock at the first row of a batch."""

        rows = token_rows(shape, (steps + 1) * shape.rows_per_batch)

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            if i % shape.rows_per_batch == 0:
                watch.look()
            return {"input_ids": torch.from_numpy(self.rows[i])}

    coder = SparseCoderConfig(num_latents=shape.d_sae, k=shape.k)
    config = TrainConfig(
        coder,
        batch_size=shape.rows_per_batch,
        optimizer="adam",
        hookpoints=[f"layers.{shape.layer}"],
        log_to_wandb=False,
    )
    with quiet():
        trainer = Trainer(config, Rows(), load(shape.folder / "step0", dtype).to(shape.device).base_model)
        trainer.save = watch.look
        trainer.fit()
    torch.set_float32_matmul_precision("highest")
    watch.add_to(timing)


class _StopForwardError(Exception):
    """Ends a forward at the module that is read."""


class Traced:
    """What dictionary_learning's buffer asks of nnsight's LanguageModel: a forward that ends at the module.

    nnsight pins old releases of much else, so it is not in the environment; what it costs is not counted.

    Args:
        llm: The LLM.
        module: Whose output is read.
    """

    dtype = torch.float32

    def __init__(self, llm: Any, module: torch.nn.Module) -> None:
        self._llm, self._module = llm, module
        self.output = SimpleNamespace(save=lambda: self._read, stop=lambda: None)
        self.inputs = SimpleNamespace(save=lambda: self._given)

    @contextmanager
    def trace(self, rows: list[np.ndarray], **_: Any) -> Iterator[None]:
        """Run the rows; what is saved inside has its value when the block ends, as with nnsight."""
        tokens = torch.from_numpy(np.stack(rows)).to(self._llm.device)
        self._read = SimpleNamespace(value=None)
        self._given = SimpleNamespace(value=((), {"attention_mask": torch.ones_like(tokens)}))
        yield

        def read(_module: Any, _inputs: Any, output: Any) -> None:
            self._read.value = output
            raise _StopForwardError

        handle = self._module.register_forward_hook(read)
        with suppress(_StopForwardError):
            self._llm(tokens)
        handle.remove()


def dictionary_learning(shape: Shape, timing: Timing, steps: int = 1) -> None:
    """dictionary_learning's trainSAE over its ActivationBuffer, with the einsum of its trainer rewritten.

    The buffer holds one batch, so that every step fills it once. Python's garbage, which it collects whenever it is
    filled, is left: with a buffer of its usual size that is once in hundreds of steps.
    """
    trainer = patched_top_k()
    from dictionary_learning import buffer as its_buffer
    from dictionary_learning.training import trainSAE

    its_buffer.gc = SimpleNamespace(collect=lambda: None)

    watch = Watch(1, steps + 1)
    llm = load(shape.folder / "step0").to(shape.device)
    traced = Traced(llm, llm.get_submodule(f"gpt_neox.layers.{shape.layer}"))
    buffer = its_buffer.ActivationBuffer(
        iter(token_rows(shape, (steps + 4) * shape.rows_per_batch)),
        traced,
        traced,
        d_submodule=llm.config.hidden_size,
        n_ctxs=shape.rows_per_batch,
        ctx_len=CONTEXT,
        refresh_batch_size=shape.rows_per_batch,
        out_batch_size=shape.batch,
        device=shape.device,
    )

    def batches() -> Iterator[Tensor]:
        for _ in range(steps + 1):
            watch.look()
            yield next(buffer)
        watch.look()

    config = {"trainer": trainer, "activation_dim": llm.config.hidden_size, "dict_size": shape.d_sae, "k": shape.k}
    config |= {"steps": 10**6, "layer": shape.layer, "lm_name": "none", "lr": 2e-4, "device": shape.device}
    with quiet():
        trainSAE(batches(), [config], steps=steps + 2, device=shape.device)
    watch.add_to(timing)


def sae_lens(shape: Shape, timing: Timing, steps: int = 1) -> None:
    """SAELens's LanguageModelSAETrainingRunner.run with its ActivationsStore, everything in float32 as by default."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, TopKTrainingSAEConfig
        from sae_lens.config import LoggingConfig

    watch = Watch(1, steps + 1)
    rows = token_rows(shape, (steps + 4) * shape.rows_per_batch)
    config = LanguageModelSAERunnerConfig(
        TopKTrainingSAEConfig(d_in=hidden_size(shape), d_sae=shape.d_sae, k=shape.k, device=shape.device),
        hook_name=f"blocks.{shape.layer}.hook_resid_post",
        context_size=CONTEXT,
        prepend_bos=False,
        training_tokens=(steps + 1) * shape.batch,
        train_batch_size_tokens=shape.batch,
        store_batch_size_prompts=shape.rows_per_batch,
        n_batches_in_buffer=2 * shape.rows_per_batch,  # rows, in fact: two batches
        lr=2e-4,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
        verbose=False,
        device=shape.device,
    )

    class Watched:
        """Its store, with a look at the clock before every batch."""

        def __init__(self, store: Any) -> None:
            self.store = store

        def __iter__(self) -> Iterator[Tensor]:
            return self

        def __next__(self) -> Tensor:
            watch.look()
            return next(self.store)

    with quiet():
        runner = LanguageModelSAETrainingRunner(config, Dataset.from_dict({"input_ids": rows.tolist()}), hooked(shape))
        runner.activations_store = Watched(runner.activations_store)
        runner.run()
        watch.look()
    watch.add_to(timing)


def hooked(shape: Shape) -> Any:
    """The same LLM in TransformerLens, which SAELens reads; checked to give the same activations."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_neox_weights

    llm = load(shape.folder / "step0").to(shape.device)
    c = llm.config
    heads = c.num_attention_heads
    config = HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_ctx=c.max_position_embeddings,
        d_head=c.hidden_size // heads,
        n_heads=heads,
        d_mlp=c.intermediate_size,
        d_vocab=c.vocab_size,
        act_fn=c.hidden_act,
        eps=c.layer_norm_eps,
        normalization_type="LN",
        positional_embedding_type="rotary",
        rotary_dim=c.hidden_size // heads // 4,
        rotary_adjacent_pairs=False,
        parallel_attn_mlp=True,
        default_prepend_bos=False,
        init_weights=False,
        device=shape.device,
    )
    model = HookedTransformer(config)
    weights = convert_neox_weights(llm, config)
    model.load_and_process_state_dict(weights, False, False, False, False)  # as they are
    tokens = torch.from_numpy(token_rows(shape, 2)).to(shape.device)
    name = f"blocks.{shape.layer}.hook_resid_post"
    with torch.inference_mode():
        theirs = model.run_with_cache(tokens, names_filter=[name], prepend_bos=False)[1][name]
        expected = llm(tokens, output_hidden_states=True).hidden_states[shape.layer + 1]
    if not torch.allclose(theirs, expected, rtol=1e-3, atol=1e-3):
        raise RuntimeError("TransformerLens gives other activations than transformers; its configuration is wrong.")
    return model


def hidden_size(shape: Shape) -> int:
    """Width of the LLM."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(shape.folder / "step0").hidden_size)


def token_rows(shape: Shape, n: int) -> np.ndarray:
    """The first rows of our training split, int64 ``[n, CONTEXT]``."""
    module = data(shape.folder, ["gpt_neox.layers.3"], 4096, "float32", 4096)
    module.prepare_data()
    module.setup("fit")
    return np.asarray(module.corpus_rows.train.tokens[:n], dtype=np.int64)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the peers' progress bars and prints."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
