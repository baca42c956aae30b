"""nanoGPT's ``ckpt.pt``: its weights become a ``GPT2LMHeadModel``, which computes the same."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saetrack.lm.local.formats import LocalFormat, assemble, check_tensors, shapes_of
from saetrack.lm.local.series import Facts, LocalSource, found_in
from saetrack.lm.local.torch_files import tensors_in
from saetrack.pickles import read_torch_file

if TYPE_CHECKING:
    from transformers import GPT2Config, PreTrainedTokenizerBase

_WHAT = "a checkpoint of nanoGPT with model, model_args and iter_num"
# of the accumulation over all processes
_BATCH = ("gradient_accumulation_steps", "batch_size", "block_size")
_SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
# Linear there and Conv1D in transformers, which keeps the transposed matrix
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@dataclass(frozen=True)
class NanoGPTFormat(LocalFormat):
    """A file that nanoGPT's ``train.py`` saved: everything that the LLM needs is in it."""

    kind: str = field(default="nanogpt", init=False)

    def weights(self, path: Path) -> dict[str, Tensor]:
        """The weights by nanoGPT's names, without torch.compile's prefix and the causal masks."""
        content = read_torch_file(path, _WHAT)
        config = _config(path, content)
        tensors = tensors_in(path, content.get("model"), "", _WHAT)
        tensors = {name: tensor for name, tensor in tensors.items() if not _is_mask(name)}
        tensors.setdefault("lm_head.weight", tensors.get("transformer.wte.weight", torch.empty(0)))
        found = {name: tensor.shape for name, tensor in tensors.items()}
        check_tensors(path, found, _shapes(content, config), "its model_args")
        return tensors

    def build(self, path: Path, dtype: torch.dtype) -> nn.Module:
        """The ``GPT2LMHeadModel``, with zeros for the biases of an LLM that was trained without."""
        from transformers import GPT2LMHeadModel

        config = _config(path, read_torch_file(path, _WHAT))
        tensors = self.weights(path)
        config.tie_word_embeddings = torch.equal(tensors["lm_head.weight"], tensors["transformer.wte.weight"])
        shapes = shapes_of(GPT2LMHeadModel, config)
        state = {name: torch.zeros(shape) for name, shape in shapes.items() if name not in tensors}
        for name, tensor in tensors.items():
            # cloned, for the tensors are mapped and a run that goes on may write the file anew
            ours = tensor.t() if name.endswith(_TRANSPOSED) else tensor
            state[name] = ours.clone(memory_format=torch.contiguous_format)
        return assemble(GPT2LMHeadModel, config, state, dtype)


class NanoGPTSource(LocalSource):
    """A folder of nanoGPT's checkpoints, such as ``ckpt_1000.pt``, ``ckpt_2000.pt``, ...; each says its ``iter_num``.

    nanoGPT keeps one file, ``ckpt.pt``, and writes it anew; a series needs a ``train.py`` that saves each.
    Its hookpoints are those of GPT-2 in transformers: ``transformer.h.3``.

    Args:
        path: The folder, nanoGPT's ``out_dir``.
        tokenizer: Folder or repository of the tokenizer, ``gpt2`` for nanoGPT's own data; by default that in ``path``.
    """

    def __init__(self, path: str | Path, tokenizer: str | None = None) -> None:
        super().__init__(path, NanoGPTFormat(), tokenizer)

    def candidates(self) -> list[Path]:
        """The ``.pt`` files."""
        return found_in(self.path, sorted(self.path.glob("*.pt")), "nanoGPT's ckpt_1000.pt, ckpt_2000.pt, ...")

    def facts(self, path: Path) -> Facts:
        """``iter_num``, and the tokens by the sizes of a batch in ``config``."""
        content = read_torch_file(path, _WHAT)
        step, run = content.get("iter_num"), content.get("config")
        if not isinstance(step, int):
            return Facts(None)
        sizes = [run[name] for name in _BATCH if isinstance(run.get(name), int)] if isinstance(run, dict) else []
        return Facts(step, step * math.prod(sizes) if len(sizes) == len(_BATCH) else None)

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, once it is seen to fit the LLM's vocabulary.

        Raises:
            ValueError: If it has more tokens than the LLM knows.
        """
        tokenizer = super().tokenizer()
        last = Path(self.checkpoints()[-1].model)
        known = _config(last, read_torch_file(last, _WHAT)).vocab_size
        if len(tokenizer) > known:
            raise ValueError(
                f"The tokenizer {self.tokenizer_name[0]} has {len(tokenizer)} tokens, but the LLM in {last} knows "
                f"{known}. Name the one that it was trained with as the source's `tokenizer`."
            )
        return tokenizer


def _config(path: Path, content: dict[str, Any]) -> "GPT2Config":
    from transformers import GPT2Config

    arguments = content.get("model_args")
    if not isinstance(arguments, dict):
        raise ValueError(f"{path} has no model_args, only {', '.join(map(str, list(content)[:6]))}; expected {_WHAT}.")
    wrong = [n for n in _SIZES if type(arguments.get(n)) is not int or arguments[n] < 1]
    if wrong or arguments["n_embd"] % arguments["n_head"]:
        name = wrong[0] if wrong else "n_embd"
        raise ValueError(f"{path}: {name} in model_args is {arguments.get(name)!r}; expected {_WHAT}.")
    other = sorted(set(arguments) - {*_SIZES, "bias", "dropout"})
    if other:
        raise ValueError(
            f"{path}: model_args has {other[0]}, which nanoGPT's GPT-2 does not know, so what the LLM computes is not "
            f"known either. Save the LLM as a folder in Hugging Face's format instead."
        )
    return GPT2Config(
        n_layer=arguments["n_layer"],
        n_head=arguments["n_head"],
        n_embd=arguments["n_embd"],
        n_positions=arguments["block_size"],
        vocab_size=arguments["vocab_size"],
        activation_function="gelu",  # nn.GELU() is the exact one; GPT-2's own is its tanh approximation
        bos_token_id=None,
        eos_token_id=None,
    )


def _shapes(content: dict[str, Any], config: "GPT2Config") -> dict[str, torch.Size]:
    """What nanoGPT's module has: GPT-2's, four matrices transposed, and biases only where it was told to."""
    from transformers import GPT2LMHeadModel

    shapes = {n: s[::-1] if n.endswith(_TRANSPOSED) else s for n, s in shapes_of(GPT2LMHeadModel, config).items()}
    biased = content["model_args"].get("bias", True)
    return {n: torch.Size(s) for n, s in shapes.items() if biased or not n.endswith(".bias")}


def _is_mask(name: str) -> bool:
    """Whether it is the causal mask, which nanoGPT keeps as a buffer ``bias`` where there is no flash attention."""
    return name.endswith(".attn.bias")
