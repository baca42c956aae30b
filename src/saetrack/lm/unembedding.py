"""What a direction at the end of the residual stream adds to each token's logit."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def read_unembedding(model: "PreTrainedModel") -> Tensor:
    """The LLM's unembedding with the gain of its final norm folded in.

    For a final norm ``g * (x - mean(x)) / sd(x) + b`` the logits are affine in ``x / sd(x)`` with matrix
    ``W_U diag(g) (I - 1 1^T / d)``; that matrix is returned. The division by ``sd(x)`` differs between positions,
    so a direction's effect is known up to it: which tokens it raises, and how much in proportion. Root-mean-square
    norms do not centre, and then neither does this.

    Args:
        model: A causal language model of transformers.

    Returns:
        Float32, shape ``[vocabulary, d_model]``, on the LLM's device.

    Raises:
        ValueError: If the LLM has no output embeddings.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings; expected a causal language model.")
    matrix: Tensor = head.weight.float()
    norm = _module_before(model, head)
    if norm is None or getattr(norm, "weight", torch.empty(0)).shape != matrix.shape[1:]:
        return matrix.clone()
    # Alternating signs have mean 0 and rms 1, so every kind of norm passes them on and shows its gain, be it stored
    # as g or, as Gemma does, as g - 1.
    signs = torch.ones(matrix.shape[1], device=matrix.device, dtype=head.weight.dtype)
    signs[1::2] = -1
    offset = norm(torch.zeros_like(signs)).float()
    matrix = matrix * ((norm(signs).float() - offset) * signs.float())
    centres = torch.allclose(norm(torch.ones_like(signs)).float(), offset, atol=1e-3)
    return matrix - matrix.mean(dim=1, keepdim=True) if centres else matrix


def _module_before(model: "PreTrainedModel", head: nn.Module) -> nn.Module | None:
    """The leaf module that runs last before the output embeddings, found by running two tokens."""
    ran: list[nn.Module] = []

    def note(module: nn.Module, _inputs: Any) -> None:
        ran.append(module)

    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    handles = [module.register_forward_pre_hook(note) for module in leaves]
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    before = ran[: ran.index(head)] if head in ran else []
    return before[-1] if before else None
