"""Latents whose presence and size are two questions."""

from typing import Any, final

import torch
from torch import Tensor, nn

from .base import SAE, LossTerms, require_coefficient, squared_error
from .firing import firing
from .select import select_positive
from .sparse import Latents, Selection, decode_at, encode_at, spread


@final
class GatedSAE(SAE):
    r"""Autoencoder with a gate that says which latents are active and a magnitude that says how much.

    ``g = (x - b_dec) W_enc + b_gate``, ``m = (x - b_dec) (W_enc * exp(r_mag)) + b_mag``, ``f = [g > 0] ReLU(m)``,
    ``x_hat = f W_dec + b_dec``, and with the decoder held fixed ``x_gate = ReLU(g) stop(W_dec) + stop(b_dec)``,

    ``L = mean_b ||x_b - x_hat_b||^2 / d_in + l1_coefficient * mean_b sum_i ReLU(g_bi) / sqrt(d_in)
    + mean_b ||x_b - x_gate,b||^2 / d_in + aux_coefficient * L_auxk``.

    Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated Sparse Autoencoders" (arXiv 2404.16014),
    section 3.2. Only the gate is penalised, so the magnitudes do not shrink; x_gate gives the gate its gradient.
    Theirs is for activations of norm 1, and here, where the norm is sqrt(d_in), ``l1_coefficient`` has their scale.
    Dead latents are revived by AuxK on g, where the paper resampled them.

    The parameters are named as SAELens names them: ``b_gate``, ``b_mag`` and ``r_mag``, each ``[d_sae]``, and no
    ``b_enc``.

    Args:
        d_in: Width of the activations. Filled in from the LLM by ``saetrack fit``.
        expansion_factor: Number of latents for each dimension of the activations; d_sae = d_in * expansion_factor.
        l1_coefficient: Weight of the gate's sparsity penalty, at least 0; larger gives fewer active latents.
            The default gave an L0 of 49 at FVU 0.061 on the quickstart's LLM (1,000 steps of 512 tokens, learning
            rate 1e-3, d_sae 2048).
        aux_coefficient: Weight of the auxiliary loss that revives dead latents; 0 turns it off.
        aux_k: How many dead latents reconstruct the error of one activation. None: d_in // 2.
    """

    def __init__(
        self,
        d_in: int,
        expansion_factor: int = 16,
        l1_coefficient: float = 0.3,
        aux_coefficient: float = 1 / 32,
        aux_k: int | None = None,
    ) -> None:
        super().__init__(d_in, expansion_factor, aux_coefficient, aux_k)
        require_coefficient("l1_coefficient", l1_coefficient)
        self.l1_coefficient = l1_coefficient
        del self.b_enc
        self.b_gate = nn.Parameter(torch.zeros(self.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(self.d_sae))
        self.r_mag = nn.Parameter(torch.zeros(self.d_sae))

    @property
    def encoder_bias(self) -> nn.Parameter:
        """The gate's bias: the pre-activations of this class are the gate's."""
        return self.b_gate

    def activate(self, pre: Tensor) -> Tensor:
        """Give the magnitude wherever the gate, which is ``pre``, is above zero."""
        return self._magnitude(pre, None) * (pre > 0)

    def _magnitude(self, pre: Tensor, selection: Selection | None) -> Tensor:
        """The magnitudes of pre-activations of the gate: of all latents, or ``[nnz]`` of those at a selection."""
        parameters = self.b_gate, self.r_mag, self.b_mag
        b_gate, r_mag, b_mag = parameters if selection is None else (spread(p, selection) for p in parameters)
        # m from g: both are the same product with W_enc, so one is enough
        return ((pre - b_gate) * r_mag.exp() + b_mag).relu()

    @torch.no_grad()
    def initialise(self, x: Tensor, generator: torch.Generator) -> None:
        """Start as :meth:`SAE.initialise` does, with gate and magnitude equal: r_mag and b_mag are 0."""
        self.r_mag.zero_()
        self.b_mag.zero_()
        super().initialise(x, generator)

    def loss(
        self, x: Tensor, dead: Tensor | None = None, before: Latents | None = None, new: Tensor | None = None
    ) -> LossTerms:
        """Compute the loss in the class's docstring; see :meth:`SAE.loss`."""
        self._check_width(x)
        latents: Tensor | Latents
        with self._full_precision():
            centred = (x - self.b_dec).detach()  # [batch, d_in]
            # where the gate is shut there is neither a value nor a gradient
            selection = select_positive(centred, self.W_enc, self.b_gate, self.precision, self.workspace)
            if selection is not None:
                pre = encode_at(centred, self.W_enc, self.b_gate, self.b_dec, selection)  # [nnz]
                values, gate = self._magnitude(pre, selection) * (pre > 0), pre.relu()
                latents = Latents(selection, values)
                x_hat = decode_at(values, selection, self.W_dec) + self.b_dec
                x_gate = decode_at(gate, selection, self.W_dec.detach()) + self.b_dec.detach()
        if selection is None:
            centred, pre = self._dense_preactivations(x)
            latents, gate = self.activate(pre), pre.relu()  # [batch, d_sae]
            x_hat = self._decode_low(latents)
            with self._low_precision():
                x_gate = gate @ self.W_dec.detach() + self.b_dec.detach()
        with self._full_precision():
            mse, gate_mse = squared_error(x, x_hat) / x.numel(), squared_error(x, x_gate) / x.numel()
            sparsity = gate.sum(dtype=torch.float32) / len(x) / self.d_in**0.5
            auxk = self._auxiliary_loss(centred, x, x_hat, dead)
            moved = self._moved(centred, latents, before, new)
        fired, l0 = firing(latents)
        return LossTerms(
            loss=mse + self.l1_coefficient * sparsity + gate_mse + self.aux_coefficient * auxk,
            fired=fired,
            l0=l0,
            x_hat=x_hat.detach(),
            terms={
                "mse": mse.detach(),
                "sparsity": sparsity.detach(),
                "gate_mse": gate_mse.detach(),
                "auxk": auxk.detach(),
            },
            moved=moved,
        )

    def saelens_config(self) -> dict[str, Any]:
        """Give the part of SAELens's cfg.json that belongs to the architecture."""
        return {"architecture": "gated"}
