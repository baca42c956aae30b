"""Lightning's ``.ckpt``: weights of a module that the user's own code builds. Lightning itself is not needed."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saetrack.lm.local.bare import BareLLM
from saetrack.lm.local.factories import call_factory
from saetrack.lm.local.formats import LocalFormat, check_tensors
from saetrack.lm.local.series import Facts, LocalSource, found_in
from saetrack.lm.local.torch_files import tensors_in
from saetrack.lm.trust import trust
from saetrack.pickles import read_torch_file

_WHAT = "a checkpoint of Lightning with state_dict and global_step"


@dataclass(frozen=True)
class LightningFormat(LocalFormat):
    """A file that Lightning saved, and how its LLM is built.

    Args:
        factory: As ``LightningSource`` takes it.
        init_args: Its arguments as json.
        prefix: What the names of the LLM's weights begin with.
    """

    factory: str
    init_args: str = "{}"
    prefix: str = "model."
    kind: str = field(default="lightning", init=False)

    def weights(self, path: Path) -> dict[str, Tensor]:
        """The weights below the prefix, without it."""
        return tensors_in(path, read_torch_file(path, _WHAT).get("state_dict"), self.prefix, _WHAT)

    def build(self, path: Path, dtype: torch.dtype) -> nn.Module:
        """The module that the factory makes, with these weights; its random ones are all replaced."""
        from transformers import PreTrainedModel

        tensors = self.weights(path)
        module = call_factory(self.factory, json.loads(self.init_args))
        own = module.state_dict(keep_vars=True)
        present = {id(own[name]) for name in tensors.keys() & own.keys()}
        expected = {n: t.shape for n, t in own.items() if n in tensors or id(t) not in present}  # tied: once is enough
        check_tensors(path, {name: tensor.shape for name, tensor in tensors.items()}, expected, self.factory)
        module.load_state_dict(tensors, strict=False)
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():  # Module.to would cast complex ones, such as rotations, to real
                tensor.data = tensor.data.to(dtype)
        return module if isinstance(module, PreTrainedModel) else BareLLM(module)


class LightningSource(LocalSource):
    """A folder of Lightning's ``.ckpt`` files, with the user's own code that builds the LLM.

    Args:
        path: The folder, that of ``ModelCheckpoint`` with ``save_top_k=-1``.
        factory: ``package.module:function`` or ``package.module.Class`` that makes the LLM: a ``PreTrainedModel``, or
            any module whose forward takes token ids and returns logits. It is imported and called.
        init_args: Its arguments, checked by its types.
        prefix: What the names of the LLM's weights begin with in the file: ``model.`` for ``self.model`` of the
            LightningModule.
        tokenizer: Folder or repository of the tokenizer; by default the one in ``path``.
    """

    def __init__(
        self,
        path: str | Path,
        factory: str,
        init_args: dict[str, Any] | None = None,
        prefix: str = "model.",
        tokenizer: str | None = None,
    ) -> None:
        trust(factory)
        arguments = json.dumps(init_args or {}, sort_keys=True)
        super().__init__(path, LightningFormat(factory, arguments, prefix), tokenizer)

    def candidates(self) -> list[Path]:
        """The ``.ckpt`` files.

        Raises:
            ValueError: If one is a folder, as sharded strategies write them.
        """
        paths = sorted(self.path.glob("*.ckpt"))
        folder = next((path for path in paths if path.is_dir()), None)
        if folder is not None:
            raise ValueError(
                f"{folder} is a sharded checkpoint. Make it one file: "
                f"`python -m lightning.pytorch.utilities.consolidate_checkpoint {folder}`, and move the folder away."
            )
        return found_in(self.path, paths, "Lightning's epoch=0-step=1000.ckpt, ...")

    def facts(self, path: Path) -> Facts:
        """``global_step``."""
        step = read_torch_file(path, _WHAT).get("global_step")
        return Facts(step if isinstance(step, int) else None)
