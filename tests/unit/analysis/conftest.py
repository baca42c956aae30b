"""A small real track: four TopK SAEs that evolve a little, over four checkpoints of the tiny LLM."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from saetrack.lm.checkpoints import LLMCheckpoint, load_llm
from saetrack.lm.forward import read_activations
from saetrack.lm.tokens import TokenRows
from saetrack.metrics import functional_correlation
from saetrack.sae import TopKSAE
from saetrack.track import Track

HOOKPOINT = "gpt_neox.layers.0"
STEPS = (0, 1, 4, 10)
CONTEXT = 16
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "log", "bird", "hand", "she", "sells", "sea", "shells"]


def packed_rows(tokenizer: Any, rows: int, seed: int) -> TokenRows:
    """Documents of random words, packed as `lm.tokens` packs them: BOS at the start of every row and document."""
    rng = np.random.default_rng(seed)
    tokens, documents, document = [], [], seed * 1000
    while len(tokens) < rows * CONTEXT:
        text = " ".join(rng.choice(WORDS, size=int(rng.integers(3, 12))))
        for token in [0, *tokenizer(text)["input_ids"]]:
            if len(tokens) % CONTEXT == 0 and token != 0:
                tokens.append(0)
                documents.append(document)
            tokens.append(token)
            documents.append(document)
        document += 1
    shape = (rows, CONTEXT)
    tokens, documents = tokens[: rows * CONTEXT], documents[: rows * CONTEXT]
    return TokenRows(
        np.array(tokens, dtype=np.int32).reshape(shape), np.array(documents, dtype=np.int32).reshape(shape), 0
    )


def read(checkpoint: LLMCheckpoint, rows: TokenRows) -> torch.Tensor:
    tokens = torch.from_numpy(rows.tokens.astype(np.int64))
    x = read_activations(load_llm(checkpoint), tokens, [HOOKPOINT])[HOOKPOINT]
    return x[torch.from_numpy(rows.usable())].float().clone()


def build_track(folder: Path, series: Path, tokenizer: Any) -> Track:
    selection, evaluation = packed_rows(tokenizer, 24, seed=1), packed_rows(tokenizer, 12, seed=2)
    facts = {
        "saetrack": "0.1.0",
        "model": str(series),
        "hookpoint": HOOKPOINT,
        "tokenizer": [str(series / "step10"), None],
        "d_in": 16,
        "d_sae": 64,
        "seed": 0,
        "corpus_hash": "0" * 32,
        "context_size": CONTEXT,
        "bos_token_id": 0,
        "llm_dtype": "float32",
    }
    track = Track.create(folder, facts, {"selection": selection, "evaluation": evaluation})
    generator = torch.Generator().manual_seed(0)
    sae, previous = TopKSAE(16, expansion_factor=4, k=4), None
    for position, step in enumerate(STEPS):
        checkpoint = LLMCheckpoint(str(series / f"step{step}"), None, step)
        x = read(checkpoint, evaluation)
        scale = (4.0 / x.norm(dim=-1).mean()).item()
        with torch.no_grad():
            if position == 0:
                sae.initialise(x * scale, generator)
                sae.b_enc[5] = -1e6  # a dead feature
            else:
                sae.W_dec.add_(0.1 * torch.randn(sae.W_dec.shape, generator=generator))
                sae.normalise_decoder_()
                sae.W_enc.copy_(0.5 * sae.W_dec.T)
        folded = sae.folded(scale)
        with torch.no_grad():
            latents = folded.encode(x)
            fvu = ((x - folded(x)).square().sum() / (x - x.mean(0)).square().sum()).item()
        correlation = None if previous is None else functional_correlation(previous, latents)
        previous = latents
        metadata = {
            "llm": {
                "model": checkpoint.model,
                "revision": None,
                "commit": None,
                "weight_hash": None,
                "step": step,
                "tokens": step * 100,
            },
            "sae": {"class": "saetrack.sae.TopKSAE", "arguments": sae.arguments},
            "tokens_trained": 1000,
            "seed": 0,
            "warm_start": "prior" if position else "scratch",
            "scale": scale,
            "fvu": fvu,
            "fvu_before": 2 * fvu if position else None,
            "fvu_shift": 2.5 * fvu if position else None,
            "explained_variance": 1 - fvu,
            "l0": (latents > 0).float().sum(1).mean().item(),
            "dead_share": (latents == 0).all(0).float().mean().item(),
            "dense_share": 0.0,
            "ce_clean": 4.0,
            "ce_sae": 4.1,
            "ce_zero": 4.4,
            "ce_mean": 4.3,
            "ce_recovered_zero": 0.75 if position else -3.0,
            "ce_recovered_mean": 2 / 3,
            "functional_correlation_median": None if correlation is None else float(correlation.nanmedian()),
        }
        firing = (latents > 0).float().mean(0).double().numpy()
        features = pd.DataFrame(
            {
                "feature": np.arange(64),
                "firing_frequency": firing,
                "mean_activation": latents.mean(0).numpy(),
                "max_activation": latents.amax(0).numpy(),
                "tokens_since_fired": 0,
                "dead": firing == 0,
                "revived": False,
                "functional_correlation": np.nan if correlation is None else correlation.numpy(),
                "decoder_cosine_previous": np.nan,
            }
        )
        statistics = {"mean": x.mean(0), "scale": torch.tensor([scale]), "covariance": torch.cov(x.T)}
        track.write(position, folded, metadata, statistics, features)
    return track


def add_control(track: Track, name: str, positions: list[int], fvu: list[float], **facts: Any) -> None:
    """A control whose snapshots are copies of the track's at ``positions``, with another FVU where one is given."""
    folder = track.path / "controls" / name
    folder.mkdir(parents=True)
    shutil.copy(track.path / "tokens.safetensors", folder)
    (folder / "track.json").write_text(json.dumps({**track.facts, "control": {"stages": len(positions), **facts}}))
    for place, (position, value) in enumerate(zip(positions, fvu, strict=True)):
        new = folder / "snapshots" / f"{place:04d}-step{track[position].step}"
        shutil.copytree(track[position].path, new)
        metadata = {**track[position].metadata, "position": place, "fvu": value}
        (new / "metadata.json").write_text(json.dumps(metadata))


def add_controls(track: Track) -> None:
    """Two null controls of stage 2 and fresh SAEs at two LLM checkpoints."""
    for replica, fvu in enumerate((0.25, 0.35)):
        start = track[1].metadata["fvu"]
        add_control(track, f"null-0002-{replica}", [1, 1], [start, fvu], kind="null", position=2, first_budget=False)
    add_control(track, "scratch-first-0", [0, 3], [0.5, 0.6], kind="scratch", position=None, first_budget=True)


@pytest.fixture(scope="session")
def shared_track(tmp_path_factory: pytest.TempPathFactory, tiny_series: Path, tiny_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("track") / HOOKPOINT
    build_track(folder, tiny_series, tiny_tokenizer)
    return folder


@pytest.fixture
def tiny_track(tmp_path: Path, shared_track: Path) -> Track:
    """Four snapshots (steps 0, 1, 4, 10) of a TopK SAE with 64 features, feature 5 dead. One's own copy."""
    return Track.open(shutil.copytree(shared_track, tmp_path / HOOKPOINT))
