"""A module that is not of transformers, with what saetrack asks of an LLM."""

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class BareLLM(nn.Module):
    """Stands in front of a module whose forward takes token ids; all parts keep their names, so hookpoints do too.

    Args:
        module: Its forward takes ``[batch, context]`` ids, first or as ``input_ids``, and returns logits ``[batch,
            context, vocabulary]``: as they are, first in a tuple, or as ``logits`` of an object.
    """

    def __init__(self, module: nn.Module) -> None:
        from transformers import PretrainedConfig

        super().__init__()
        # the same tables, not a child: as a child, every part's name would begin with the child's
        self._modules, self._parameters, self._buffers = module._modules, module._parameters, module._buffers
        object.__setattr__(self, "module", module)
        own = getattr(module, "config", None)
        known = next((m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)), None)
        self.config = own if isinstance(own, PretrainedConfig) else PretrainedConfig(vocab_size=known)
        self._by_name = "input_ids" in inspect.signature(module.forward).parameters

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["module"] if name == "module" else super().__getattr__(name)

    @property
    def device(self) -> torch.device:
        """Where its first parameter is."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """That of its first parameter."""
        return next(self.parameters()).dtype

    def train(self, mode: bool = True) -> "BareLLM":
        """As for any module; what stands behind is told, too."""
        self.module.training = mode
        return super().train(mode)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Logits of every position.

        Raises:
            ValueError: If the module gives something else.
        """
        output = self.module(input_ids=input_ids) if self._by_name else self.module(input_ids)
        logits = getattr(output, "logits", output[0] if isinstance(output, tuple | list) and output else output)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != input_ids.shape:
            got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"The forward of {type(self.module).__name__} gives {got} for ids of shape {tuple(input_ids.shape)}; "
                f"expected logits of every position, [batch, context, vocabulary]. The factory should return one."
            )
        return SimpleNamespace(logits=logits)

    def get_input_embeddings(self) -> nn.Module:
        """The module's own answer, or else its first embedding, which is that of the tokens where names are in order.

        Raises:
            ValueError: If it has none.
        """
        own = getattr(self.module, "get_input_embeddings", None)
        found = own() if own else next((m for m in self.modules() if isinstance(m, nn.Embedding)), None)
        if not isinstance(found, nn.Module):
            raise ValueError(f"{type(self.module).__name__} has no embedding; give it a method get_input_embeddings.")
        return found

    def get_output_embeddings(self) -> nn.Module | None:
        """The module's own answer; None where it has no such method, and then nothing is read from its unembedding."""
        own = getattr(self.module, "get_output_embeddings", None)
        return own() if own else None
