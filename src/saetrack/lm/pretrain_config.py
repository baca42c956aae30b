"""What `saetrack pretrain` can be told, and what follows from it without training anything.

Apart from `saetrack.lm.pretrain`, which imports Lightning, so that those who only name a series need not.
"""

import json
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from saetrack.lm.corpus import Corpus, StdlibCorpus

END_OF_TEXT = "<|endoftext|>"
_LAST_DOUBLED_STEP = 512


@dataclass
class PretrainConfig:
    """The LLM that `saetrack pretrain` makes, and how. The defaults take minutes on two CPU cores."""

    n_layers: int = 4
    """Number of layers."""
    d_model: int = 128
    """Width of the residual stream; the MLPs are four times as wide."""
    n_heads: int = 4
    """Attention heads in a layer."""
    vocab_size: int = 4096
    """Size of the byte-level BPE vocabulary that is trained on the corpus (on its first 33 M characters)."""
    context_size: int = 128
    """Tokens in a row, BOS included."""
    batch_size: int = 32
    """Rows in a step."""
    steps: int = 600
    """Optimizer steps. The last one is always a checkpoint."""
    every: int = 1000
    """After steps 0, 1, 2, 4, ... 512, a checkpoint at each multiple of this."""
    learning_rate: float = 4.0e-3
    """Learning rate of the stable phase (AdamW)."""
    warmup_steps: int = 50
    """Steps of linear warmup at the start."""
    decay_share: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls linearly to zero."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    seed: int = 0
    """Seeds the initial weights and the order of the data."""
    corpus: Corpus = field(default_factory=StdlibCorpus)
    """The text. Documents of its selection and evaluation splits (see `tokenize_corpus`) are not trained on."""

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "n_heads", "batch_size", "steps", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"pretrain: {name} is {getattr(self, name)}, but must be at least 1.")
        if self.d_model % self.n_heads:
            raise ValueError(f"pretrain: d_model {self.d_model} must be a multiple of n_heads {self.n_heads}.")
        if self.vocab_size < 257:
            raise ValueError(
                f"pretrain: vocab_size is {self.vocab_size}, but must be at least 257 (all bytes and {END_OF_TEXT})."
            )
        if not 0 <= self.decay_share <= 1 or self.warmup_steps < 0:
            raise ValueError(
                f"pretrain: decay_share is {self.decay_share} and warmup_steps {self.warmup_steps}; the one must be "
                f"from 0 to 1, the other 0 or more."
            )

    @property
    def checkpoint_steps(self) -> list[int]:
        """The steps that are saved: 0, 1, 2, 4, ... 512, the multiples of `every` above, and the last."""
        doubled = [2**n for n in range(_LAST_DOUBLED_STEP.bit_length())]
        multiples = range(self.every, self.steps, self.every)
        return sorted({0, self.steps, *(s for s in doubled if s < self.steps), *(s for s in multiples if s > 512)})

    @property
    def plain_facts(self) -> dict[str, Any]:
        """The configuration without the corpus, as json."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "corpus"}

    @property
    def facts(self) -> dict[str, Any]:
        """The configuration as json, with the identity of the corpus."""
        return {**self.plain_facts, "corpus": json.loads(self.corpus.identity)}


def learning_rate_factor(step: int, config: PretrainConfig) -> float:
    """Warmup-stable-decay: linear from 0, constant at 1, linear to 0.

    Checkpoints of the stable phase are comparable with their neighbours, for nothing but the number of tokens differs.

    Args:
        step: Optimizer steps already made.
        config: Lengths of the three phases.

    Returns:
        Factor of the learning rate, above 0 and at most 1.

    Example:
        >>> config = PretrainConfig(steps=10, warmup_steps=2, decay_share=0.2)
        >>> [learning_rate_factor(step, config) for step in range(10)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5]
    """
    decay_steps = round(config.decay_share * config.steps)
    warmup = (step + 1) / config.warmup_steps if config.warmup_steps else 1.0
    decay = (config.steps - step) / decay_steps if decay_steps else 1.0
    return min(1.0, warmup, decay)


def rows_of_step(step: int, n_rows: int, config: PretrainConfig) -> npt.NDArray[np.int64]:
    """Which rows of the training split an optimizer step reads, drawn with replacement: a function of (seed, step).

    Returns:
        Row numbers, shape ``[batch_size]``.
    """
    return np.random.default_rng((config.seed, step)).integers(n_rows, size=config.batch_size)
