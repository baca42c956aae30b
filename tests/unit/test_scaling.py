"""The arithmetic of docs/scaling.md against what the code does."""

from pathlib import Path

import pytest
import torch
from scaling import LLM, LLMS, Hardware, Series, disk_bytes, factor_bytes, series_hours, table, weights
from torch import Tensor
from torch import distributed as dist
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from saetrack.lm.forward import read_activations
from saetrack.sae import TopKSAE, save_saelens, use_exchange

TINY = LLM("tiny", d=16, layers=3, read=2, vocab=50, context=8)
SERIES = Series(d_sae=64, k=4, batch=32, checkpoints=3, tokens_first=320, tokens_next=64)


def test_the_llms_flops_and_parameters_are_those_of_its_forward() -> None:
    shape = {"hidden_size": TINY.d, "num_hidden_layers": TINY.layers, "intermediate_size": 4 * TINY.d}
    config = GPTNeoXConfig(**shape, num_attention_heads=2, vocab_size=TINY.vocab, attn_implementation="eager")
    llm = GPTNeoXForCausalLM(config).eval()
    tokens = torch.zeros(4, TINY.context, dtype=torch.int64)
    with FlopCounterMode(display=False) as harvest, torch.inference_mode():
        read_activations(llm, tokens, ["gpt_neox.layers.1"])
    with FlopCounterMode(display=False) as whole, torch.inference_mode():
        llm(tokens)
    assert harvest.get_total_flops() == tokens.numel() * TINY.harvest_flops
    assert whole.get_total_flops() == tokens.numel() * TINY.whole_flops
    assert sum(p.numel() for p in llm.parameters() if p.ndim == 2) == TINY.parameters


def test_a_batch_exchanges_the_bytes_and_selects_by_the_flops_that_the_formulas_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    gather = dist.all_gather

    def counting(parts: list[Tensor], x: Tensor) -> None:
        sent.append(x.nbytes)
        gather(parts, x)

    monkeypatch.setattr(dist, "all_gather", counting)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        use_exchange("factors")
        sae, previous = (TopKSAE(TINY.d, SERIES.d_sae // TINY.d, SERIES.k) for _ in range(2))
        previous.b_enc.data.fill_(100.0)  # every latent of the snapshot before counts
        x = torch.randn(SERIES.batch, TINY.d, generator=torch.Generator().manual_seed(0))
        with FlopCounterMode(display=False) as select:
            before = previous.sparse_latents(x)
            out = sae.loss(x, before=before)
        assert out.moved is not None
        (out.loss + out.moved).backward()
    finally:
        use_exchange("nothing")
        dist.destroy_process_group()
    assert sum(sent) == factor_bytes(TINY, SERIES)
    assert select.get_total_flops() == 2 * 2 * SERIES.batch * TINY.d * SERIES.d_sae


def test_a_snapshot_has_the_bytes_that_the_formula_says(tmp_path: Path) -> None:
    save_saelens(TopKSAE(TINY.d, 64 // TINY.d, 4), tmp_path, {})
    one = disk_bytes(TINY, SERIES)["snapshots"] / SERIES.checkpoints - TINY.d**2 * 4
    biases = 4 * (64 + TINY.d)
    header = 1000
    assert one == weights(TINY, SERIES)
    assert 0 <= (tmp_path / "sae_weights.safetensors").stat().st_size - one - biases < header


def test_the_page_shows_the_tables_that_the_script_prints() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    for llm in LLMS.values():
        for line in table(llm, Series(), Hardware(), [1, 8, 64]).splitlines():
            assert line in page


def test_more_gpus_never_do_more_of_what_is_shared() -> None:
    one, eight = (series_hours(LLMS["pythia-410m"], Series(), Hardware(), n) for n in (1, 8))
    for part in ("harvest", "select", "pairs", "sparse latents"):
        assert eight[part] == pytest.approx(one[part] / 8)
    assert eight["whole batch"] == one["whole batch"]
    assert one["exchange"] == 0 < eight["exchange"]
