import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXForCausalLM

from saetrack import metrics
from saetrack.lm import (
    JsonLinesCorpus,
    LLMCheckpoint,
    RowSettings,
    TokenColumns,
    TokenRows,
    edit_activations,
    next_token_losses,
    read_activations,
    tokenize_corpus,
)
from saetrack.lm.rows import Layout
from saetrack.sae import SAE, StandardSAE, TopKSAE
from saetrack.training.evaluation import (
    Site,
    cross_entropy_recovered,
    evaluate,
    functional_correlation,
    latents_on,
    reconstruction_fvu,
)
from saetrack.training.stream import harvest
from tests.conftest import build_tokenizer

D = 16
H = "gpt_neox.layers.0"
OTHER = "gpt_neox.layers.1"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def site(make_llm: Callable[..., GPTNeoXForCausalLM]) -> Site:
    """70 rows that the LLM wrote itself, so that it predicts them better than chance; BOS (id 0) in some middles."""
    llm, generator = make_llm(0), torch.Generator().manual_seed(0)
    with torch.no_grad():
        llm.get_output_embeddings().weight.mul_(4)  # a random LLM's predictions are too flat for an ablation to hurt
    tokens = torch.zeros(70, 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(15):
            probabilities = llm(tokens).logits[:, -1].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    tokens[::5, 7] = 0
    rows = TokenRows(tokens.numpy().astype(np.uint16), np.zeros(tokens.shape, dtype=np.int32), bos_token_id=0)
    return Site(llm, LLMCheckpoint("m", None, 0), rows)


@pytest.fixture(scope="module")
def x(site: Site) -> Tensor:
    """All usable activations at once, read with transformers' own hidden states."""
    tokens = torch.from_numpy(site.rows.tokens.astype(np.int64))
    with torch.no_grad():
        return site.llm(tokens, output_hidden_states=True).hidden_states[1][tokens != 0]


def trained(x: Tensor, seed: int = 1) -> SAE:
    sae = TopKSAE(D, 2, k=4)
    sae.initialise(x, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        sae.b_enc[3] = -1e6  # one dead feature
    return sae.requires_grad_(False)


def identity() -> SAE:
    """Reconstructs everything: one latent for each half-axis."""
    sae = StandardSAE(D, 2)
    sae.load_state_dict(
        {
            "W_enc": torch.cat([torch.eye(D), -torch.eye(D)], dim=1),
            "b_enc": torch.zeros(2 * D),
            "W_dec": torch.cat([torch.eye(D), -torch.eye(D)]),
            "b_dec": torch.zeros(D),
        }
    )
    return sae.requires_grad_(False)


def constant(value: Tensor) -> SAE:
    """Reconstructs one activation, whatever it reads."""
    sae = StandardSAE(D, 2)
    with torch.no_grad():
        sae.b_dec.copy_(value)
    return sae.requires_grad_(False)


def test_evaluation_batch_by_batch_is_the_metrics_on_everything_at_once(site: Site, x: Tensor) -> None:
    sae = trained(x)
    got = evaluate(site, {H: sae})[H]
    latents = sae.encode(x)
    assert got.scalars["fvu"] == pytest.approx(metrics.fraction_variance_unexplained(x, sae(x)).item(), rel=1e-4)
    assert got.scalars["explained_variance"] == pytest.approx(metrics.explained_variance(x, sae(x)).item(), rel=1e-4)
    assert got.scalars["l0"] == pytest.approx(metrics.l0(latents).item(), rel=1e-3)
    assert got.scalars["evaluation_tokens"] == len(x) == (site.rows.tokens != 0).sum()
    frequency = metrics.firing_frequency(latents)
    torch.testing.assert_close(got.features["firing_frequency"], frequency, rtol=0, atol=3 / len(x))
    assert got.features["firing_frequency"][3] == 0
    torch.testing.assert_close(got.features["max_activation"].float(), latents.amax(0), rtol=1e-4, atol=1e-4)
    stacked = np.concatenate([part.toarray() for part in got.latents])
    np.testing.assert_allclose(stacked, latents, rtol=1e-4, atol=1e-4)
    assert [part.shape[0] for part in got.latents] == [
        int((site.rows.tokens[i : i + 32] != 0).sum()) for i in (0, 32, 64)
    ]


def test_hookpoints_are_measured_apart(site: Site, x: Tensor) -> None:
    saes = {H: trained(x), OTHER: trained(x, seed=2)}
    both = evaluate(site, saes)
    for hookpoint, sae in saes.items():
        alone = evaluate(site, {hookpoint: sae})[hookpoint]
        assert alone.scalars == both[hookpoint].scalars
    assert both[H].scalars["fvu"] != both[OTHER].scalars["fvu"]


def test_an_sae_that_is_the_identity_misses_nothing(site: Site, x: Tensor) -> None:
    assert evaluate(site, {H: identity()})[H].scalars["fvu"] == pytest.approx(0, abs=1e-10)
    recovered = cross_entropy_recovered(site, {H: identity()}, {H: x.mean(0)})[H]
    assert recovered["ce_zero"] > recovered["ce_clean"] + 0.05  # else there is nothing to recover
    assert recovered["ce_sae"] == pytest.approx(recovered["ce_clean"], rel=1e-5)
    assert recovered["ce_recovered_zero"] == pytest.approx(1, abs=1e-3)
    assert recovered["ce_recovered_mean"] == pytest.approx(1, abs=1e-3)


def test_fvu_is_measured_against_the_mean(site: Site, x: Tensor) -> None:
    named = {"mean": constant(x.mean(0)), "zero": constant(torch.zeros(D)), "identity": identity()}
    got = reconstruction_fvu(site, {H: named})[H]
    zero = x.double().square().sum() / (x.double() - x.double().mean(0)).square().sum()
    assert got["mean"] == pytest.approx(1, abs=1e-5)
    assert got["zero"] == pytest.approx(zero.item(), rel=1e-4)
    assert got["zero"] > 1
    assert got["identity"] == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_an_sae_that_is_the_ablation_recovers_nothing(site: Site, x: Tensor, ablation: str) -> None:
    sae = constant(x.mean(0) if ablation == "mean" else torch.zeros(D))
    got = cross_entropy_recovered(site, {H: sae}, {H: x.mean(0)})[H]
    assert got["ce_sae"] == pytest.approx(got[f"ce_{ablation}"], rel=1e-6)
    assert got[f"ce_recovered_{ablation}"] == pytest.approx(0, abs=1e-4)


def cross_entropy_by_hand(site: Site, edit: Callable[[Tensor], Tensor], spare_bos: bool = True) -> float:
    """A hook of its own, and one token after the other."""
    tokens = torch.from_numpy(site.rows.tokens.astype(np.int64))

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        x = output if isinstance(output, Tensor) else output[0]
        x = torch.where((tokens != 0)[..., None] if spare_bos else torch.tensor(True), edit(x), x)
        return x if isinstance(output, Tensor) else (x, *output[1:])

    handle = site.llm.gpt_neox.layers[0].register_forward_hook(hook)
    with torch.no_grad():
        log_p = site.llm(tokens).logits.double().log_softmax(-1)
    handle.remove()
    losses = [
        -log_p[r, t, tokens[r, t + 1]].item()
        for r in range(tokens.shape[0])
        for t in range(tokens.shape[1] - 1)
        if tokens[r, t] != 0
    ]
    return sum(losses) / len(losses)


def test_cross_entropy_spares_bos_positions_and_does_not_count_them(site: Site, x: Tensor) -> None:
    sae, mean = trained(x), x.mean(0)
    got = cross_entropy_recovered(site, {H: sae}, {H: mean})[H]
    edits = {"ce_clean": lambda x: x, "ce_sae": sae, "ce_zero": torch.zeros_like, "ce_mean": mean.expand_as}
    for name, edit in edits.items():
        assert got[name] == pytest.approx(cross_entropy_by_hand(site, edit), rel=1e-4)
    # the case can tell: replacing BOS as well gives another number
    assert abs(cross_entropy_by_hand(site, sae, spare_bos=False) - got["ce_sae"]) > 1e-3
    expected = (got["ce_zero"] - got["ce_sae"]) / (got["ce_zero"] - got["ce_clean"])
    assert got["ce_recovered_zero"] == pytest.approx(expected, rel=1e-6)


def test_latents_correlate_fully_with_themselves_and_a_dead_one_with_nothing(site: Site, x: Tensor) -> None:
    latents = latents_on(site, {H: trained(x)})[H]
    got = functional_correlation(latents, latents, 2 * D, CPU)
    alive = torch.arange(2 * D) != 3
    fired = torch.from_numpy(np.concatenate([part.toarray() for part in latents]).std(0) > 0)
    assert fired.sum() > D
    torch.testing.assert_close(got[fired], torch.ones(int(fired.sum()), dtype=torch.float64), rtol=0, atol=1e-9)
    assert got[~fired].isnan().all()
    assert not fired[~alive].any()


def test_correlation_between_two_saes_matches_numpy(site: Site, x: Tensor) -> None:
    a, b = (latents_on(site, {H: trained(x, seed)})[H] for seed in (1, 2))
    got = functional_correlation(a, b, 2 * D, CPU).numpy()
    dense_a, dense_b = (np.concatenate([part.toarray() for part in latents]).astype(np.float64) for latents in (a, b))
    both = [i for i in range(2 * D) if dense_a[:, i].std() > 0 and dense_b[:, i].std() > 0]
    assert len(both) > 5
    for i in both:
        assert got[i] == pytest.approx(np.corrcoef(dense_a[:, i], dense_b[:, i])[0, 1], abs=1e-9)
    assert np.nanmax(got) < 0.999


def test_latents_on_and_evaluate_give_the_same_latents(site: Site, x: Tensor) -> None:
    """After a resume the first gives what the second remembered; the bytes of the snapshot depend on it."""
    sae = trained(x)
    for a, b in zip(latents_on(site, {H: sae})[H], evaluate(site, {H: sae})[H].latents, strict=True):
        assert (a != b).nnz == 0


def test_ranks_share_the_evaluation_rows(site: Site) -> None:
    shares = [Site(site.llm, site.checkpoint, site.rows, rank, 3).indices for rank in range(3)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(70))


def test_outliers_are_not_measured_and_have_no_latents(site: Site, x: Tensor) -> None:
    sae, norms = trained(x), x.norm(dim=1)
    limit = norms.quantile(0.9).item() + 1e-4
    kept = x[norms <= limit]
    assert 0 < len(kept) < len(x)
    limited = replace(site, norm_limits={H: limit})
    got = evaluate(limited, {H: sae})[H]
    assert got.scalars["fvu"] == pytest.approx(metrics.fraction_variance_unexplained(kept, sae(kept)).item(), rel=1e-4)
    assert got.scalars["evaluation_tokens"] == len(kept)
    expected = torch.where((norms <= limit)[:, None], sae.encode(x), 0)
    for parts in (got.latents, latents_on(limited, {H: sae})[H]):
        np.testing.assert_allclose(np.concatenate([p.toarray() for p in parts]), expected, rtol=1e-4, atol=1e-4)
    fvu = reconstruction_fvu(limited, {H: {"sae": sae}, OTHER: {"sae": sae}})
    assert fvu[H]["sae"] == pytest.approx(got.scalars["fvu"], rel=1e-6)
    assert fvu[OTHER] == reconstruction_fvu(site, {OTHER: {"sae": sae}})[OTHER]


def test_cross_entropy_spares_outliers_and_does_not_count_them(site: Site, x: Tensor) -> None:
    sae, limit = trained(x), x.norm(dim=1).quantile(0.8).item()
    got = cross_entropy_recovered(replace(site, norm_limits={H: limit}), {OTHER: sae, H: sae}, {H: x[0], OTHER: x[0]})
    tokens = torch.from_numpy(site.rows.tokens.astype(np.int64))
    at = read_activations(site.llm, tokens, [H])[H]
    counted = (tokens != 0) & (at.norm(dim=-1) <= limit)
    for name, edit in (("ce_clean", lambda x: x), ("ce_sae", sae), ("ce_zero", torch.zeros_like)):
        logits = edit_activations(site.llm, tokens, H, lambda x, edit=edit: torch.where(counted[..., None], edit(x), x))
        by_hand = next_token_losses(logits, tokens)[counted[:, :-1]].mean().item()
        assert got[H][name] == pytest.approx(by_hand, rel=1e-5)
    assert got[OTHER] == cross_entropy_recovered(site, {OTHER: sae}, {OTHER: x[0]})[OTHER]


def alone(site: Site) -> list[list[int]]:
    """The pieces of documents in the rows of a site, without padding."""
    pieces = []
    for tokens, documents in zip(site.rows.tokens, site.rows.documents, strict=True):
        cuts = np.flatnonzero(np.diff(documents)) + 1
        parts = zip(np.split(tokens, cuts), np.split(documents, cuts), strict=True)
        pieces += [part.tolist() for part, number in parts if number[0] >= 0]
    return pieces


@pytest.mark.parametrize("layout", ["masked", "separate"])
def test_documents_that_share_no_context_are_measured_as_if_alone(
    site: Site, x: Tensor, layout: Layout, tmp_path: Path
) -> None:
    """Activations and losses of rows agree with forwards of one document each, without mask or padding."""
    (tmp_path / "ids.jsonl").write_text(
        "".join(json.dumps({"input_ids": row[: 4 + i % 20].tolist()}) + "\n" for i, row in enumerate(site.rows.tokens))
    )
    corpus = JsonLinesCorpus([str(tmp_path / "ids.jsonl")], tokens=TokenColumns())
    shares = {"selection_share": 0.0, "evaluation_share": 0.0, "vocab_size": 64}
    made = tokenize_corpus(
        corpus, build_tokenizer(), ("", None), 16, tmp_path, settings=RowSettings(layout=layout), **shares
    )
    here = Site(site.llm, site.checkpoint, made.train)
    sae, mean = trained(x), x.mean(0)
    got = cross_entropy_recovered(here, {H: sae}, {H: mean})[H]
    activations, losses = [], {"ce_clean": [], "ce_sae": []}
    for piece in alone(here):
        tokens = torch.tensor([piece])
        keep = (tokens != 0) & (tokens != 1)
        read = read_activations(site.llm, tokens, [H])[H]
        activations.append(read[keep])
        for name, edit in (("ce_clean", lambda x: x), ("ce_sae", sae)):

            def edited(x: Tensor, edit: Any = edit, keep: Tensor = keep) -> Tensor:
                return torch.where(keep[..., None], edit(x), x)

            logits = edit_activations(site.llm, tokens, H, edited)
            losses[name].append(next_token_losses(logits, tokens)[keep[:, :-1]])
    harvested = torch.cat([a[H] for _, a in harvest(site.llm, site.checkpoint, made.train, [H], here.indices)])
    torch.testing.assert_close(harvested, torch.cat(activations), rtol=1e-5, atol=1e-5)
    for name, parts in losses.items():
        assert got[name] == pytest.approx(torch.cat(parts).mean().item(), rel=1e-5)
