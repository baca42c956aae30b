"""The LLM's forward pass to a hookpoint, with what a module gives there read or replaced.

A hookpoint is the dotted name of any module, such as ``gpt_neox.layers.3`` or ``transformer.h.3.mlp``; the activation
is that module's output, or the first element where it gives several. ``NAME@LANE`` is the same module again, for one of
several SAEs on it.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Hook = Callable[[nn.Module, Any, Any], Any]


class _AllReadError(Exception):
    """Ends the forward pass where the last hookpoint has been read."""


def module_name(hookpoint: str) -> str:
    """The module that a hookpoint is the output of: its name without a lane.

    Example:
        >>> module_name("gpt_neox.layers.3@null-0")
        'gpt_neox.layers.3'
    """
    return hookpoint.partition("@")[0]


def lane_numbers(hookpoints: Sequence[str]) -> dict[str, int]:
    """For each hookpoint, how many before it are of the same module: 0 unless there are lanes.

    Example:
        >>> lane_numbers(["layers.1@a", "layers.2", "layers.1@b"])
        {'layers.1@a': 0, 'layers.2': 0, 'layers.1@b': 1}
    """
    modules = [module_name(hookpoint) for hookpoint in hookpoints]
    return {hookpoint: modules[:i].count(modules[i]) for i, hookpoint in enumerate(hookpoints)}


def resolve_hookpoint(model: nn.Module, name: str) -> nn.Module:
    """The module that a hookpoint names.

    Raises:
        ValueError: If there is no such module (the closest names are listed), or if it is only a list of modules.
    """
    modules: dict[str, nn.Module] = {
        n: m
        for n, m in model.named_modules(remove_duplicate=False)
        if n and not isinstance(m, nn.ModuleList | nn.ModuleDict)
    }
    if name in modules:
        return modules[name]
    inside = [n for n in modules if n.startswith(f"{name}.")] if name else []
    close = inside[:3] or difflib.get_close_matches(name, modules, n=3, cutoff=0.4) or list(modules)[:3]
    kind = type(model).__name__
    wrong = f"is a list of modules of {kind}, not one" if inside else f"is no module of {kind}"
    raise ValueError(f"Hookpoint {name!r} {wrong}. The closest names are {', '.join(close)}.")


@torch.inference_mode()
def read_activations(
    model: "PreTrainedModel",
    tokens: Tensor,
    hookpoints: Sequence[str],
    documents: NDArray[np.int32] | None = None,
    take: Callable[[str, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Activations of the LLM at each hookpoint; layers after the last of them are not run.

    Args:
        model: A causal language model of transformers.
        tokens: Token ids, shape ``[batch, context]``, without padding.
        hookpoints: Dotted module names, in any order.
        documents: The number of the document that each token is of, ``[batch, context]``: attention then stays inside
            a document, and positions count from its beginning. None is one context a row.
        take: Given a module's name and its activations, ``[batch, context, d_in]``, while the LLM runs: returns what
            to keep of them, which must be a copy, for a later module may work in place. By default all of them.

    Returns:
        For each hookpoint, in the order given, its activations, shape ``[batch, context, d_in]`` unless ``take`` gives
        another, in the LLM's dtype and on its device; the lanes of a module share one tensor. Ordinary tensors, which
        autograd may save: only the LLM itself runs in inference mode.

    Raises:
        ValueError: If a hookpoint is unknown, is not run, or does not give one vector for each token.
    """
    modules = {name: resolve_hookpoint(model, name) for name in map(module_name, hookpoints)}
    if not modules:
        raise ValueError("No hookpoint was given. Name at least one module, such as gpt_neox.layers.3.")
    seen: dict[str, Tensor] = {}

    def reader(name: str) -> Hook:
        def read(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if name in seen:
                return
            activation = _activation(name, output, tokens)
            # Outside of inference mode, so that an SAE can train on it.
            with torch.inference_mode(False):
                seen[name] = activation.clone() if take is None else take(name, activation)
            if len(seen) == len(modules):
                raise _AllReadError

        return read

    with _hooks([(module, reader(name)) for name, module in modules.items()]):
        try:
            _run(model, tokens, documents)
        except _AllReadError:
            return {hookpoint: seen[module_name(hookpoint)] for hookpoint in hookpoints}
    raise ValueError(_not_run([name for name in modules if name not in seen]))


@torch.inference_mode()
def edit_activations(
    model: "PreTrainedModel",
    tokens: Tensor,
    hookpoint: str,
    edit: Callable[[Tensor], Tensor],
    documents: NDArray[np.int32] | None = None,
) -> Tensor:
    """Logits of the LLM when its activations at a hookpoint are replaced.

    With an SAE's reconstruction, zero or the mean activation as ``edit`` this gives the losses that CE loss recovered
    compares.

    Args:
        model: A causal language model of transformers.
        tokens: Token ids, shape ``[batch, context]``, without padding.
        hookpoint: Dotted module name.
        edit: Takes the activations, ``[batch, context, d_in]`` in the LLM's dtype, and returns what to put in their
            place, of the same shape; it is cast back to the LLM's dtype.
        documents: As for `read_activations`.

    Returns:
        Logits, shape ``[batch, context, vocabulary]``, in the LLM's dtype.

    Raises:
        ValueError: If the hookpoint is unknown or is not run, or if ``edit`` changes the shape.
    """
    ran = False

    def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        nonlocal ran
        ran = True
        activation = _activation(hookpoint, output, tokens)
        edited = edit(activation)
        if edited.shape != activation.shape:
            raise ValueError(
                f"The edit at {hookpoint} gives shape {tuple(edited.shape)} for activations of shape "
                f"{tuple(activation.shape)}; they must be equal."
            )
        return _with_activation(output, edited.to(activation))

    with _hooks([(resolve_hookpoint(model, module_name(hookpoint)), replace)]):
        logits = _run(model, tokens, documents)
    if not ran:
        raise ValueError(_not_run([hookpoint]))
    return logits


def next_token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross entropy of each next token, in nats.

    Args:
        logits: Shape ``[batch, context, vocabulary]``.
        tokens: Token ids, shape ``[batch, context]``.

    Returns:
        Float32, shape ``[batch, context - 1]``: at ``[:, t]`` the loss of predicting ``tokens[:, t + 1]``.

    Raises:
        ValueError: If the shapes do not belong together.

    Example:
        >>> next_token_losses(torch.zeros(1, 3, 2), torch.tensor([[1, 0, 1]]))
        tensor([[0.6931, 0.6931]])
    """
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} but tokens {tuple(tokens.shape)}; expected [batch, context, "
            f"vocabulary] and [batch, context]."
        )
    # flat, since a softmax over the middle axis of [batch, vocabulary, context] takes longer; and whole, with the last
    # position ignored, since flattening a part would copy the logits
    targets = tokens.to(device=logits.device, dtype=torch.long).roll(-1, dims=1)
    targets[:, -1] = -100
    losses = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="none")
    return losses.view(targets.shape)[:, :-1]


@dataclass(frozen=True)
class EditableLLM:
    """An LLM whose activations at one hookpoint may be changed, and what it then predicts.

    Args:
        model: A causal language model of transformers.
        hookpoint: Dotted module name.
    """

    model: "PreTrainedModel"
    hookpoint: str

    @torch.inference_mode()
    def log_probabilities(self, tokens: Tensor, change: Tensor | None = None) -> Tensor:
        """What the LLM predicts with something added to its activations.

        Args:
            tokens: Token ids, shape ``[batch, context]``, without padding.
            change: What is added, ``[batch, context, d_in]`` in the LLM's own units, in float32 and then rounded to the
                LLM's dtype; None for nothing.

        Returns:
            Logarithms of the next token's probabilities, ``[batch, context - 1, vocabulary]``, float32 on the LLM's
            device.

        Raises:
            ValueError: If ``change`` has another shape than the activations.
        """
        added = None if change is None else change.to(self.model.device)
        logits = edit_activations(
            self.model, tokens, self.hookpoint, lambda x: x if added is None else x.float() + added
        )
        return logits[:, :-1].float().log_softmax(dim=-1)


def activation_widths(model: "PreTrainedModel", hookpoints: Sequence[str]) -> dict[str, int]:
    """Width ``d_in`` of the activations at each hookpoint, found by running two tokens.

    Raises:
        ValueError: As for ``read_activations``.
    """
    activations = read_activations(model, torch.zeros(1, 2, dtype=torch.long), hookpoints)
    return {name: activation.shape[-1] for name, activation in activations.items()}


@torch.inference_mode()
def refuse_leaking_documents(model: "PreTrainedModel", context_size: int) -> None:
    """Refuse an LLM whose forward does not keep the documents of a row apart when it is told to.

    Some take no mask or no positions (ALiBi), and a mask replaces a sliding window. So two documents in one row are
    held against each alone: they must agree far better than without a mask.

    Raises:
        ValueError: If they do not.
    """
    tokens = (7 + 31 * torch.arange(context_size)) % model.config.get_text_config().vocab_size
    cut = context_size - max(1, min(3, context_size // 2))
    alone = torch.cat([_run(model, part[None]) for part in (tokens[:cut], tokens[cut:])], dim=1).float()
    leak = (_run(model, tokens[None]).float() - alone).abs().max().item()
    noise = (1e-4 if model.dtype == torch.float32 else 5e-2) * alone.abs().max().item()
    try:
        apart = _run(model, tokens[None], (np.arange(context_size) >= cut)[None].astype(np.int32))
        missed = f"the logits differ by {(error := (apart.float() - alone).abs().max().item()):.2g}"
    except (TypeError, ValueError, RuntimeError, IndexError) as raised:
        error, missed = float("inf"), f"it raises {type(raised).__name__}"
    if not error <= max(0.1 * leak, noise):
        raise ValueError(
            f"data.tokens.layout is masked, but {type(model).__name__} does not keep two documents in a row apart: "
            f"{missed} from what each gives alone. Use `separate`, a document a row, or `packed`."
        )


def _run(model: "PreTrainedModel", tokens: Tensor, documents: NDArray[np.int32] | None = None) -> Tensor:
    apart = {} if documents is None else _document_mask(torch.from_numpy(documents).to(model.device), model.dtype)
    ids = tokens.to(device=model.device, dtype=torch.long)
    logits: Tensor = model(input_ids=ids, use_cache=False, **apart).logits
    return logits


def _document_mask(documents: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The arguments of a forward in which every document of a row has a context of its own."""
    place = torch.arange(documents.shape[1], device=documents.device)
    begins = documents.diff(dim=1, prepend=documents[:, :1] - 1) != 0  # [batch, context]
    begin = torch.where(begins, place, 0).cummax(dim=1).values
    seen = (begin[:, :, None] == begin[:, None, :]) & (place[:, None] >= place)  # [batch, context, context]
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    return {"attention_mask": mask[:, None], "position_ids": place - begin}


@contextmanager
def _hooks(hooks: Sequence[tuple[nn.Module, Hook]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _activation(hookpoint: str, output: Any, tokens: Tensor) -> Tensor:
    """The tensor in a module's output, which may be a tuple or one of transformers' ordered outputs."""
    value = output if isinstance(output, Tensor) else output[0]
    if not isinstance(value, Tensor) or value.shape[:-1] != tokens.shape:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"Hookpoint {hookpoint} gives {got} for tokens of shape {tuple(tokens.shape)}; expected [batch, context, "
            f"d_in]. Choose a module whose output is one vector for each token, such as a layer or its mlp."
        )
    return value


def _with_activation(output: Any, value: Tensor) -> Any:
    """The same output with another first element."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, tuple | list):
        return type(output)([value, *output[1:]])
    fields = dict(output)
    fields[next(iter(fields))] = value
    return type(output)(**fields)


def _not_run(hookpoints: Sequence[str]) -> str:
    return (
        f"Hookpoint {', '.join(hookpoints)} is a module of the LLM, but its forward pass does not call it. Choose a "
        f"layer, or a module inside one."
    )
