"""torchtitan's Llama: distributed checkpoints whose weights become a ``LlamaForCausalLM``, which computes the same.

Its rotary embedding turns the pairs (0, 1), (2, 3), ... of a head, as Meta's code does; that of transformers turns
(0, d/2), (1, d/2 + 1), .... So the rows of the query and key matrices change places, head by head, and their products
stay as they were.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saetrack.lm import files
from saetrack.lm.local.dcp import METADATA, read_tensors, tensor_shapes
from saetrack.lm.local.formats import LocalFormat, assemble, check_tensors, shapes_of
from saetrack.lm.local.series import Facts, LocalSource, found_in
from saetrack.lm.names import parse_name
from saetrack.pickles import reason

# Names in transformers -> in torchtitan; those of a layer begin with model.layers.N. and layers.N.
_OUTER = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
_INNER = {
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}
_LAYER = re.compile(r"model\.(layers\.\d+\.)(.+)")
# a weight of the LLM, not of the optimizer, whose names begin with `optimizer.`; older runs begin with `model.`
_WEIGHT = re.compile(r"(?:model\.)?((?:tok_embeddings|layers|norm|output)\..+)")


@dataclass(frozen=True)
class TorchtitanFormat(LocalFormat):
    """A folder that torchtitan saved with torch.distributed.checkpoint.

    Args:
        config: Folder or repository with the LLM's ``config.json``, for heads, rotary base and norm are not in the
            checkpoint.
    """

    config: str
    kind: str = field(default="torchtitan", init=False)

    def weights(self, path: Path) -> dict[str, Tensor]:
        """The weights by torchtitan's names; the optimizer's state beside them is not read."""
        from transformers import LlamaForCausalLM

        config = self._config()
        names = {match[1]: name for name in tensor_shapes(path) if (match := _WEIGHT.fullmatch(name)) is not None}
        shapes = {short: tensor_shapes(path)[name] for short, name in names.items()}
        expected = {self._theirs(n): shape for n, shape in shapes_of(LlamaForCausalLM, config).items()}
        if config.tie_word_embeddings and "output.weight" not in shapes:
            del expected["output.weight"]
        check_tensors(path, shapes, expected, f"the config.json of {self.config}")
        tensors = read_tensors(path, names.values())
        return {short: tensors[name] for short, name in names.items()}

    def build(self, path: Path, dtype: torch.dtype) -> nn.Module:
        """The ``LlamaForCausalLM``."""
        from transformers import LlamaForCausalLM

        config, tensors = self._config(), self.weights(path)
        tied = tensors.get("output.weight", tensors["tok_embeddings.weight"])
        if config.tie_word_embeddings and not torch.equal(tied, tensors["tok_embeddings.weight"]):
            raise ValueError(
                f"{path} has an output.weight of its own, but the config.json of {self.config} says that it is "
                f"tok_embeddings.weight. Set tie_word_embeddings there to false."
            )
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        state = {}
        for ours in shapes_of(LlamaForCausalLM, config):
            tensor = tensors.get(self._theirs(ours), tied)
            matrix = ours.split(".")[-2]
            state[ours] = halves(tensor, heads[matrix]) if matrix in heads else tensor
        return assemble(LlamaForCausalLM, config, state, dtype)

    def _config(self) -> Any:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.config, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"There is no config.json of a Llama in {self.config} ({reason(error)}). Name the folder that has it "
                f"as the source's `config`."
            ) from error
        if config.model_type != "llama":
            raise ValueError(f"The config.json of {self.config} is of a {config.model_type}; expected one of a llama.")
        return config

    def _theirs(self, name: str) -> str:
        """Torchtitan's name of a weight."""
        match = _LAYER.fullmatch(name)
        theirs = _OUTER.get(name) if match is None else _INNER.get(match[2]) and match[1] + _INNER[match[2]]
        if theirs is None:
            raise ValueError(f"The config.json of {self.config} has {name}, which torchtitan's Llama does not.")
        return theirs


class TorchtitanSource(LocalSource):
    """A folder of torchtitan's checkpoints of a Llama, ``step-1000``, ``step-2000``, ..., as they are.

    Its hookpoints are those of Llama in transformers: ``model.layers.3``.

    Args:
        path: The folder ``outputs/checkpoint`` of the run.
        config: Folder or repository with the LLM's ``config.json`` in Hugging Face's format, such as torchtitan's
            ``hf_assets_path``.
        tokenizer: Folder or repository of the tokenizer; by default ``config``, where it has one, or ``path``.
    """

    def __init__(self, path: str | Path, config: str, tokenizer: str | None = None) -> None:
        if tokenizer is None and files.is_folder(config) and files.has_tokenizer(config, None):
            tokenizer = config
        super().__init__(path, TorchtitanFormat(config), tokenizer)

    def candidates(self) -> list[Path]:
        """The folders with a ``.metadata``, which is written last, so they are complete."""
        folders = [path.parent for path in sorted(self.path.glob(f"*/{METADATA}"))]
        named = [folder for folder in folders if parse_name(folder.name) is not None]
        return found_in(self.path, named, f"torchtitan's step-1000, ... with {METADATA}")

    def facts(self, path: Path) -> Facts:
        """Nothing: what torchtitan keeps of its progress is a pickle, so the name says the step."""
        return Facts(None)


def halves(matrix: Tensor, heads: int) -> Tensor:
    """Rows of a query or key matrix, from neighbouring pairs to the two halves of each head.

    Args:
        matrix: ``[heads * d_head, d_model]``.
        heads: How many heads.

    Example:
        >>> halves(torch.arange(6)[:, None], heads=1).flatten()
        tensor([0, 2, 4, 1, 3, 5])
    """
    pairs = matrix.reshape(heads, -1, 2, matrix.shape[1])  # [heads, d_head / 2, 2, d_model]
    return pairs.transpose(1, 2).reshape(matrix.shape)
