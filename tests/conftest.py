"""Fixtures that every test file may use: tiny, seeded, offline.

``tiny_series`` is shared by the whole session, so tests read it and never write into it;
``make_series`` builds a folder of one's own.
"""

import gc
import os

# huggingface_hub reads this once, when it is first imported; a test that needs the Hub is marked `network` and
# is run with HF_HUB_OFFLINE=0 from outside.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

TINY_STEPS = (0, 1, 2, 4, 10)
TINY_TEXT = [
    "the cat sat on the mat and the dog sat on the log.",
    "a bird in the hand is worth two in the bush, said the old man.",
    "def add(a, b):\n    return a + b\n",
    "for i in range(10):\n    print(i, add(i, 2))\n",
    "she sells sea shells by the sea shore; the shells she sells are sea shells.",
    "jack quickly gave five extra boxes of wax to the happy zoo keeper 3456789.",
]


@pytest.fixture(autouse=True, scope="session")
def _quiet_transformers() -> None:
    transformers_logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope="session")
def _collect_no_libraries() -> None:
    """Every load of an LLM collects garbage, 0.2 s of which is a look at what importing transformers has made."""
    gc.collect()
    gc.freeze()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A real byte-level BPE of at most 64 tokens; `<|endoftext|>` is id 0, and is both BOS and EOS."""
    tokenizer = Tokenizer(models.BPE(unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=64, special_tokens=["<|endoftext|>", "<|unk|>"], show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(TINY_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|unk|>"
    )


def build_llm(seed: int, vocab_size: int = 64) -> GPTNeoXForCausalLM:
    """A random GPT-NeoX: width 16, two layers, contexts up to 64."""
    config = GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPTNeoXForCausalLM(config).eval()


def build_series(
    folder: Path, steps: Sequence[int] = TINY_STEPS, seed: int = 0, name: str = "step{}", tokenizer: bool = True
) -> Path:
    """Hugging Face folders `step0`, `step1`, ... whose weights move on a line from one random LLM to another."""
    first, last = build_llm(seed).state_dict(), build_llm(seed + 1).state_dict()
    llm, end = build_llm(seed), max(*steps, 1)
    for step in steps:
        llm.load_state_dict({key: torch.lerp(first[key], last[key], step / end) for key in first})
        target = folder / name.format(step)
        llm.save_pretrained(target)
        if tokenizer:
            build_tokenizer().save_pretrained(target)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `step0`, `step1`, `step2`, `step4`, `step10`. Read only: the whole session shares it."""
    return build_series(tmp_path_factory.mktemp("llm") / "series")


@pytest.fixture(scope="session")
def make_series() -> Callable[..., Path]:
    """Build a series of one's own: ``make_series(tmp_path, steps=[0, 5], name="checkpoint-{}")``."""
    return build_series


@pytest.fixture(scope="session")
def make_llm() -> Callable[..., GPTNeoXForCausalLM]:
    """A random LLM by seed: ``make_llm(seed=0)``."""
    return build_llm
