"""The contract of every sparse autoencoder."""

import copy
import inspect
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import scipy.sparse
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import Self

from . import native, ranks
from .auxk import DeadLatents, auxiliary_loss, revive
from .continuity import moved
from .dense import relu_reconstruct
from .geometric_median import geometric_median
from .sparse import Latents, Selection, encode_at
from .workspace import Workspace

_CHUNK_NUMBERS = 2**21  # 8 MiB of float32: the dense latents that encode_sparse holds at a time
INITIAL_ROWS = 4096  # from these an SAE's first scale is taken
_CACHED_NUMBERS = 2**19  # 2 MiB of float32
_INITIAL_NUMBERS = 2**23  # 32 MiB of float32: the dense latents that are held meanwhile


class LossTerms(NamedTuple):
    """What one training batch says.

    Attributes:
        loss: Scalar to minimise.
        fired: Which latents were above zero for any activation of the batch, bool ``[d_sae]``.
        l0: Mean number of latents above zero, scalar, detached.
        x_hat: Reconstruction, shape ``[batch, d_in]``, detached.
        terms: Detached scalars for logging: "mse", "sparsity" where there is one, "auxk", and any further
            reconstruction error of the class. Each is unweighted:
            ``loss = mse + coefficient * sparsity + further errors + aux_coefficient * auxk``.
        smallest_kept: Smallest latent above zero, scalar, detached, NaN without any; None but for SAEs whose
            inference threshold follows it. `SAE.after_step_` wants it, averaged over the ranks.
        moved: How far the latents are from those ``before``, scalar, not part of ``loss``:
            ``sum (z - before)^2 / sum before^2`` over the entries where either is active, z the pre-activation where
            a latent was active before, so that one that fell below its threshold is drawn back. Where ``new`` latents
            alone are active they do not count. None without ``before``. `SAEModule` counts it in units of the
            reconstruction error.
    """

    loss: Tensor
    fired: Tensor
    l0: Tensor
    x_hat: Tensor
    terms: dict[str, Tensor]
    smallest_kept: Tensor | None = None
    moved: Tensor | None = None


class SAE(nn.Module, ABC):
    """A sparse autoencoder: latents = activation((x - b_dec) W_enc + b_enc), x_hat = latents W_dec + b_dec.

    Parameters are float32: ``W_enc [d_in, d_sae]``, ``b_enc [d_sae]``, ``W_dec [d_sae, d_in]``, ``b_dec [d_in]``.
    They are zero until `initialise` or ``load_state_dict`` fills them. The loss expects training units:
    activations scaled to a mean norm of sqrt(d_in).

    ``encode``, ``decode`` and ``forward`` are what inference does, in ``train()`` and ``eval()`` alike; only ``loss``
    may do otherwise, such as choose latents by the whole batch. So nothing can be measured in the wrong mode.

    Args:
        d_in: Width of the activations. Filled in from the LLM by ``saetrack fit``.
        expansion_factor: Number of latents for each dimension of the activations; d_sae = d_in * expansion_factor.
        aux_coefficient: Weight of the auxiliary loss that revives dead latents; 0 turns it off.
        aux_k: How many dead latents reconstruct the error of one activation. None: d_in // 2, as in Gao et al.

    Raises:
        ValueError: If a size is below 1 or a coefficient negative.
    """

    sparse_gradients: ClassVar[bool] = False
    """Whether every gradient of the encoder, its bias and the decoder comes from `sparse` and `auxk`, so that ranks can
    exchange what they are made of (`ranks`)."""

    static_shapes: ClassVar[bool] = False
    """Whether, with `dead_places`, no shape in `loss` and `sparse_latents` depends on a value, and on a GPU nothing is
    waited for, so that a step can be recorded as a CUDA graph."""

    def __init__(self, d_in: int, expansion_factor: int, aux_coefficient: float, aux_k: int | None) -> None:
        super().__init__()
        if d_in < 1 or expansion_factor < 1:
            raise ValueError(f"d_in ({d_in}) and sae.expansion_factor ({expansion_factor}) must be at least 1.")
        if aux_k is not None and aux_k < 1:
            raise ValueError(f"sae.aux_k must be at least 1, but is {aux_k}; sae.aux_coefficient 0 turns AuxK off.")
        require_coefficient("aux_coefficient", aux_coefficient)
        self.d_in = d_in
        self.expansion_factor = expansion_factor
        self.d_sae = d_in * expansion_factor
        self.aux_coefficient = aux_coefficient
        self.aux_k = max(1, d_in // 2) if aux_k is None else aux_k
        # [d_in, d_sae], but a latent's column lies in one piece, for the step reads and writes few of them
        self.W_enc = nn.Parameter(torch.zeros(self.d_sae, d_in).T)
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(self.d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.precision = torch.float32
        """Dtype of the large products in `loss`; parameters, sums and whatever is small are float32 always.
        Not an argument, for it belongs to the machine and not to the SAE: see `resolve_precision`."""
        self.dead_places: int | None = None
        """Latents that AuxK works on where as many are dead or fewer; None for just the dead. Set by `StepGraph`."""
        self.workspace = Workspace()
        """Memory that a step leaves for the next; a copy has its own."""

    @property
    def encoder_bias(self) -> nn.Parameter:
        """The bias of `preactivations`, ``[d_sae]``, whatever its name in the class."""
        return self.b_enc

    @abstractmethod
    def activate(self, pre: Tensor) -> Tensor:
        """Turn pre-activations into the latents of inference, both ``[..., d_sae]``."""

    def activate_batch(self, pre: Tensor) -> Tensor:
        """Turn the pre-activations of a training batch into its latents, both ``[batch, d_sae]``.

        As `activate`, except in classes whose training looks at the whole batch.
        """
        return self.activate(pre)

    @abstractmethod
    def loss(
        self, x: Tensor, dead: Tensor | None = None, before: Latents | None = None, new: Tensor | None = None
    ) -> LossTerms:
        """Compute the training loss of one batch.

        Args:
            x: Activations in training units (mean norm sqrt(d_in)), shape ``[batch, d_in]``.
            dead: Latents to revive by AuxK, bool ``[d_sae]``; None for none.
            before: Latents that the previous SAE had at the same tokens on the previous LLM checkpoint, to say in
                `LossTerms.moved` how far these are from them; zeros among them are latents that it did not have.
            new: Latents that may fire where ``before`` has none at no cost, bool ``[d_sae]``; None for none.

        Returns:
            The loss with its parts.

        Raises:
            ValueError: If ``x`` or ``dead`` has the wrong width.
        """

    @abstractmethod
    def saelens_config(self) -> dict[str, Any]:
        """Give the part of SAELens's cfg.json that belongs to the architecture."""

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments, json-able: ``type(sae)(**sae.arguments)`` has the same shape and loss."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    @torch.no_grad()
    def initialise(self, x: Tensor, generator: torch.Generator) -> None:
        """Start from the data: b_dec at their geometric median, random unit decoder rows, W_enc along W_dec^T, b_enc 0.

        W_enc = c W_dec^T with the one factor c that leaves the least error on ``x``. With c = 1, the sum over
        thousands of ReLU latents overshoots many times (FVU 12 at 8 latents a dimension, 0.2 with c fitted).

        Args:
            x: Activations in training units, shape ``[n, d_in]``; a few thousand are enough.
            generator: Source of the decoder's directions; equal generators give equal SAEs.

        Raises:
            ValueError: If ``x`` has the wrong width, is empty or holds NaN or infinities.
        """
        self._check_width(x)
        x = x.to(self.b_dec)
        self.b_dec.copy_(geometric_median(x))
        self.encoder_bias.zero_()
        self.W_dec.copy_(torch.randn(self.d_sae, self.d_in, generator=generator, device=generator.device))
        self.normalise_decoder_()
        self.W_enc.copy_(self.W_dec.T)
        overlap = power = 0.0
        for sample in torch.split(x[:INITIAL_ROWS], max(1, _INITIAL_NUMBERS // self.d_sae)):
            centred = sample - self.b_dec  # [rows, d_in]
            guess = self.activate_batch(self.preactivations(sample)) @ self.W_dec
            # Latents grow in proportion to W_enc while biases and thresholds are 0, so the best factor is a projection.
            overlap += (centred * guess).sum().item()
            power += guess.square().sum().item()
        if overlap > 0:
            self.W_enc.mul_(overlap / power)

    def preactivations(self, x: Tensor) -> Tensor:
        """Give the latents before the activation function.

        Args:
            x: Activations, shape ``[..., d_in]``.

        Returns:
            ``(x - b_dec) W_enc + b_enc``, shape ``[..., d_sae]``.

        Raises:
            ValueError: If the last dimension of ``x`` is not d_in.
        """
        self._check_width(x)
        # (x - b_dec) first, as SAELens does: folding b_dec into b_enc would round differently.
        return (x - self.b_dec) @ self.W_enc + self.encoder_bias

    def encode(self, x: Tensor) -> Tensor:
        """Compute the latents.

        Args:
            x: Activations, shape ``[..., d_in]``.

        Returns:
            Latents, never negative, shape ``[..., d_sae]``.

        Raises:
            ValueError: If the last dimension of ``x`` is not d_in.
        """
        return self.activate(self.preactivations(x))

    def decode(self, latents: Tensor) -> Tensor:
        """Reconstruct activations, ``[..., d_in]``, from latents, ``[..., d_sae]``."""
        return latents @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct activations of shape ``[..., d_in]``."""
        return self.decode(self.encode(x))

    @torch.inference_mode()
    def encode_sparse(self, x: Tensor) -> scipy.sparse.csr_array:
        """Compute the latents in sparse form, a few rows at a time, so that many tokens fit into memory.

        Args:
            x: Activations, shape ``[n, d_in]``, on the SAE's device.

        Returns:
            The values of `encode` that are not zero, float32 on the CPU, shape ``[n, d_sae]``.

        Raises:
            ValueError: If ``x`` is not ``[n, d_in]``.
        """
        if x.ndim != 2:
            raise ValueError(f"x has shape {tuple(x.shape)}; expected [n, {self.d_in}].")
        rows = max(1, _CHUNK_NUMBERS // self.d_sae)
        chunks = []
        for start in range(0, max(1, len(x)), rows):
            part = x[start : start + rows]
            latents = self.encode(part)  # [rows, d_sae]
            row, column = latents.nonzero(as_tuple=True)
            indptr = torch.zeros(len(part) + 1, dtype=torch.int32)
            indptr[1:] = torch.bincount(row, minlength=len(part)).cumsum(0)
            values = latents[row, column].float()
            arrays = (values.cpu().numpy(), column.to(torch.int32).cpu().numpy(), indptr.numpy())
            chunks.append(scipy.sparse.csr_array(arrays, shape=(len(part), self.d_sae)))
        return chunks[0] if len(chunks) == 1 else scipy.sparse.csr_array(scipy.sparse.vstack(chunks, format="csr"))

    @torch.no_grad()
    def sparse_latents(self, x: Tensor) -> Latents:
        """The positive latents of `encode` for activations ``[batch, d_in]``."""
        latents = self.encode(x)
        rows, columns = latents.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=len(x))
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Latents(Selection(columns, offsets, self.d_sae), latents[rows, columns])

    @torch.no_grad()
    def normalise_decoder_(self) -> None:
        """Bring every decoder row to unit norm, in place. A row of zeros stays one."""
        if native.in_use(self.W_dec):
            native.normalise_(self.W_dec)
            return
        norms = torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True)  # [d_sae, 1]
        self.W_dec.div_(norms.clamp_min(torch.finfo(norms.dtype).tiny))

    @torch.no_grad()
    def after_step_(self, smallest_kept: Tensor | None = None) -> None:
        """Put in order, in place, what an optimizer step has moved: here the decoder rows, back to unit norm.

        Args:
            smallest_kept: `LossTerms.smallest_kept` of the batch, averaged over the ranks.
        """
        self.normalise_decoder_()

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> None:
        """Take out of the decoder's gradient what only changes row norms, in place; a no-op without a gradient.

        Normalising the rows undoes a step along them, but Adam would count it in its moments.
        Bricken et al. 2023, "Towards Monosemanticity", appendix "Advice for training sparse autoencoders".
        """
        grad = self.W_dec.grad
        if grad is None:
            return
        if native.in_use(self.W_dec, grad) and grad.is_contiguous():
            native.remove_parallel_(self.W_dec, grad)
            return
        # A part that fits into the cache is read from memory once; a GPU takes everything at once.
        size = self.d_sae if grad.is_cuda else max(1, _CACHED_NUMBERS // self.d_in)
        for rows, change in zip(torch.split(self.W_dec, size), torch.split(grad, size), strict=True):
            squared = torch.linalg.vector_norm(rows, dim=1).square()  # [size]
            along = torch.linalg.vecdot(change, rows) / squared.clamp_min(torch.finfo(grad.dtype).tiny)
            change.addcmul_(along[:, None], rows, value=-1.0)

    @torch.no_grad()
    def folded(self, scale: float) -> Self:
        """Copy the SAE to other units: ``folded(s)(x) == sae(s * x) / s``, with equal latents.

        With the scale of a stage this leads from training units to the LLM's own; with its inverse, back.

        Args:
            scale: Training units for each unit of the copy's activations, > 0.

        Returns:
            A copy with W_enc * s, W_dec / s (rows of norm 1/s where they had norm 1) and b_dec / s.

        Raises:
            ValueError: If ``scale`` is not positive and finite.
        """
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale must be positive and finite, but is {scale}.")
        other = copy.deepcopy(self)
        other.W_enc.mul_(scale)
        other.W_dec.div_(scale)
        other.b_dec.div_(scale)
        return other

    def _dense_preactivations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the loss of a dense SAE starts from, the product in `precision`.

        Returns:
            x - b_dec without a gradient ``[batch, d_in]``, and the pre-activations ``[batch, d_sae]`` in
            `precision`.
        """
        self._check_width(x)
        with self._full_precision():
            centred = (x - self.b_dec).detach()
            # Adds zero, and gives b_dec its gradient -W_enc @ grad(b_enc) by a product of a matrix with a vector;
            # through `centred` it would cost as much as the encoder itself.
            bias = self.encoder_bias + (self.b_dec.detach() - self.b_dec) @ self.W_enc.detach()
        with self._low_precision():
            return centred, functional.linear(centred, self.W_enc.T, bias)

    def _relu_reconstruct(self, centred: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`relu_reconstruct` with this SAE's parameters, its products in `precision`."""
        dtype = self.precision if self.precision != torch.float32 else self.W_enc.dtype
        parameters = self.W_enc, self.b_enc, self.W_dec, self.b_dec
        return relu_reconstruct(centred, parameters, weights, dtype, self.workspace)

    def _decode_low(self, latents: Tensor) -> Tensor:
        """`decode` with its product in `precision`."""
        with self._low_precision():
            return latents @ self.W_dec + self.b_dec

    def _moved(
        self, centred: Tensor, latents: Tensor | Latents, before: Latents | None, new: Tensor | None
    ) -> Tensor | None:
        if before is None:
            return None
        pre = encode_at(centred, self.W_enc, self.encoder_bias, self.b_dec, before.selection)
        return moved(centred, pre, latents, before, new)

    def _dead_latents(self, dead: Tensor | None) -> DeadLatents | None:
        if dead is None or self.aux_coefficient == 0 or self.dead_places == 0:
            return None
        return DeadLatents.where(dead, self.W_dec, self.aux_k, self.precision, self.dead_places)

    def _auxiliary_loss(self, centred: Tensor, x: Tensor, x_hat: Tensor, dead: Tensor | None) -> Tensor:
        latents = self._dead_latents(dead)
        parameters = self.W_enc, self.encoder_bias, self.W_dec, self.b_dec
        return auxiliary_loss(x, x_hat, revive(centred, parameters, latents), latents)

    def _low_precision(self) -> torch.autocast:
        """Inside, dense products run in `precision`, whatever autocast is on outside."""
        low = self.precision != torch.float32
        return torch.autocast(self.b_dec.device.type, dtype=self.precision if low else None, enabled=low)

    def _full_precision(self) -> torch.autocast:
        """Inside, everything is float32, whatever autocast is on outside."""
        return torch.autocast(self.b_dec.device.type, enabled=False)

    def _checked_k(self, k: int) -> int:
        if not 1 <= k <= self.d_sae:
            raise ValueError(
                f"sae.k must be from 1 to d_sae = {self.d_in} * {self.expansion_factor} = {self.d_sae}, but is {k}; "
                f"lower `sae.k` or raise `sae.expansion_factor`."
            )
        return k

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1:] != (self.d_in,):
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but this SAE reads activations of width {self.d_in} (d_in)."
            )


def squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """``sum (x - x_hat)^2``, a scalar; with one pass for its gradient where a difference and its square take three."""
    return functional.mse_loss(x_hat, x, reduction="sum")


def variance_of(x: Tensor) -> Tensor:
    """`ranks.total_variance`, or 1 where all activations are equal.

    Their error is then left as it is instead of becoming NaN.
    """
    variance = ranks.total_variance(x)
    return torch.where(variance > 0, variance, 1.0)


def require_coefficient(name: str, value: float) -> None:
    """Raise ValueError unless a loss coefficient is finite and not negative."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"sae.{name} must be a finite number of at least 0, but is {value}.")
