"""An LLM of pythia-70m's shape with random weights, and rows of tokens for it: what the loops are measured on."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from saetrack.lm import FolderSource, JsonLinesCorpus, TokenColumns
from saetrack.training import ActivationDataModule, TokenSettings

D_IN, LAYERS, VOCABULARY, CONTEXT = 512, 6, 50_304, 128
ROWS = 2_000


def make(
    folder: Path,
    d_in: int = D_IN,
    vocabulary: int = VOCABULARY,
    rows: int = ROWS,
    layers: int = LAYERS,
    heads: int = 8,
    checkpoints: int = 1,
) -> Path:
    """The LLM in ``folder/step0`` and on, and ``folder/rows.jsonl``; what is there is left as it is."""
    for step in range(checkpoints):
        checkpoint = folder / f"step{step}"
        if checkpoint.is_dir():
            continue
        torch.manual_seed(step)
        config = GPTNeoXConfig(
            vocab_size=vocabulary,
            hidden_size=d_in,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * d_in,
            rotary_pct=0.25,
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=None,
        )
        GPTNeoXForCausalLM(config).save_pretrained(checkpoint)
        words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(checkpoint)
    file = folder / "rows.jsonl"
    if not file.is_file() or len(file.read_text().splitlines()) < rows:
        ids = np.random.default_rng(0).integers(vocabulary, size=(rows, CONTEXT))
        file.write_text("".join(f'{{"input_ids": {row.tolist()}}}\n' for row in ids))
    return folder / "step0"


def data(folder: Path, hookpoints: list[str], chunk_tokens: int, llm_dtype: str, batch: int) -> ActivationDataModule:
    """Our DataModule over it. Rows have no BOS, so that every position counts and all loops train on the same.

    Calibration and measurements are as small as they can be: they are no part of a loop's speed.
    """
    small = {f"{name}_tokens": CONTEXT for name in ("selection", "evaluation", "held_out", "ce")}
    tokens = TokenSettings(
        context_size=CONTEXT, bos="never", calibration_tokens=8192, cache_dir=folder / "tokens", **small
    )
    corpus = JsonLinesCorpus([str(folder / "rows.jsonl")], tokens=TokenColumns("input_ids"))
    return ActivationDataModule(FolderSource(folder), hookpoints, corpus, tokens, batch, chunk_tokens, llm_dtype)


def load(checkpoint: Path, dtype: torch.dtype = torch.float32) -> GPTNeoXForCausalLM:
    """The LLM as its authors' library gives it."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval().requires_grad_(False)
