"""A made-up track of any size, for `report.py`: as many numbers and words as a real one has, and no meaning.

python benchmarks/report_track.py /tmp/track --checkpoints 30 --features 4096
"""

import argparse
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from saetrack.analysis.base import AnalysisResult
from saetrack.lm.tokens import TokenRows
from saetrack.sae import TopKSAE
from saetrack.track import Track

D_IN, CONTEXT, ROWS, RANKS, BESIDE = 64, 128, 512, 8, 10
CLASSES = ("concept", "position", "token", "unresolved", "word-family")


def build(folder: Path, checkpoints: int, features: int) -> Track:
    """A track with the results that the report reads.

    Args:
        folder: To be made.
        checkpoints: Snapshots, at steps 0, 1, 2, 4, ... and then evenly.
        features: d_sae, a multiple of 64.
    """
    rng = np.random.default_rng(0)
    steps = [0, *(2**i for i in range(10))][:checkpoints]
    steps += [1000 * (i + 1) for i in range(checkpoints - len(steps))]
    tokenizer, rows = _text(folder)
    facts = {
        "saetrack": "0",
        "model": "made-up",
        "hookpoint": "layers.0",
        "tokenizer": [str(tokenizer), None],
        "d_in": D_IN,
        "d_sae": features,
        "seed": 0,
        "corpus_hash": "0" * 32,
        "context_size": CONTEXT,
        "bos_token_id": 0,
        "llm_dtype": "float32",
    }
    track = Track.create(folder / "track", facts, {"selection": rows, "evaluation": rows})
    sae = TopKSAE(D_IN, expansion_factor=features // D_IN, k=8)
    for position, step in enumerate(steps):
        with torch.no_grad():
            sae.W_dec.add_(torch.from_numpy(rng.normal(0, 0.3, sae.W_dec.shape).astype(np.float32)))
            sae.normalise_decoder_()
        _write_snapshot(track, sae, position, step, rng)
    track.refresh()
    _formation(track, steps, features, rng)
    _drift(track, steps, features, rng)
    _semantics(track, steps, features, rows, rng)
    _profile(track, steps, features, rng)
    return track


def _text(folder: Path) -> tuple[Path, TokenRows]:
    """The standard library's source code, in tokens of its own."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=["<bos>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>").save_pretrained(
        folder / "tokenizer"
    )
    ids = np.concatenate([tokenizer.encode(page).ids for page in text])[: ROWS * CONTEXT].astype(np.int32)
    documents = np.repeat(np.arange(ROWS, dtype=np.int32) // 4, CONTEXT).reshape(ROWS, CONTEXT)
    return folder / "tokenizer", TokenRows(ids.reshape(ROWS, CONTEXT), documents, 0)


def _write_snapshot(track: Track, sae: TopKSAE, position: int, step: int, rng: np.random.Generator) -> None:
    features = sae.d_sae
    firing = 10 ** rng.uniform(-4.5, -1, features)
    firing[rng.random(features) < 0.05] = 0
    metadata = {
        "llm": {
            "model": "made-up",
            "revision": None,
            "commit": None,
            "weight_hash": None,
            "step": step,
            "tokens": None,
        },
        "sae": {"class": "saetrack.sae.TopKSAE", "arguments": sae.arguments},
        "warm_start": "prior" if position else "scratch",
        "tokens_trained": 1000,
        "seed": 0,
    }
    table = pd.DataFrame(
        {
            "feature": np.arange(features),
            "firing_frequency": firing,
            "dead": firing == 0,
            "functional_correlation": rng.uniform(0, 1, features) if position else np.nan,
        }
    )
    statistics = {"mean": torch.zeros(D_IN), "scale": torch.ones(1), "covariance": torch.eye(D_IN)}
    track.write(position, sae, metadata, statistics, table)


def _formation(track: Track, steps: Sequence[int], features: int, rng: np.random.Generator) -> None:
    formed = np.where(rng.random(features) < 0.7, rng.choice(steps[1:], features), np.nan)
    status = np.where(np.isnan(formed), "never", "formed")
    by_feature = pd.DataFrame({"feature": np.arange(features), "formed_step": formed, "status": status})
    by_feature["formed_low"], by_feature["formed_high"] = formed * 0.8, formed * 1.2
    grid = _grid(steps, features)
    grid["progress_token"] = rng.uniform(0, 1, len(grid)).astype(np.float32)
    grid["progress_se"] = 0.02
    curve = pd.DataFrame({"step": steps, "baseline": "token"})
    for name, value in {"mean": 0.4, "low": 0.3, "high": 0.5, "null_low": -0.02, "null_high": 0.02}.items():
        curve[name] = value
    _save(track, "formation", {"features": by_feature, "formation": grid, "population": curve})


def _drift(track: Track, steps: Sequence[int], features: int, rng: np.random.Generator) -> None:
    grid = _grid(steps, features)
    for name in ("decoder_to_previous", "decoder_to_last", "decoder_to_last_if_random_walk"):
        grid[name] = rng.uniform(0, 1, len(grid)).astype(np.float32)
    excess = _grid(steps, features)
    excess["drift_null"] = rng.uniform(0, 0.2, len(excess)).astype(np.float32)
    excess["excess"] = rng.uniform(0, 0.2, len(excess)).astype(np.float32)
    _save(track, "drift", {"drift": grid, "excess": excess})


def _semantics(track: Track, steps: Sequence[int], features: int, rows: TokenRows, rng: np.random.Generator) -> None:
    grid = _grid(steps, features)
    grid["class"] = np.array(CLASSES)[rng.integers(0, len(CLASSES), len(grid))]
    grid["n_eff"] = rng.uniform(1, 100, len(grid)).astype(np.float32)
    grid["n_eff_shuffled"] = 200.0
    _save(track, "semantics", {"features": grid})
    count, width = len(grid) * RANKS, 2 * BESIDE + 1
    column = rng.integers(BESIDE, CONTEXT - BESIDE, count)
    strongest = rng.uniform(1, 5, count)
    shades = rng.random((count, width)) * (rng.random((count, width)) < 0.15)
    shades[:, BESIDE] = 1
    lists = pa.ListArray.from_arrays(
        pa.array(np.arange(count + 1, dtype=np.int32) * width), pa.array((shades * strongest[:, None]).ravel())
    )
    table = pa.table(
        {
            "step": np.repeat(grid["step"].to_numpy(), RANKS),
            "feature": np.repeat(grid["feature"].to_numpy(), RANKS),
            "rank": np.tile(np.arange(RANKS), len(grid)),
            "row": rng.integers(0, ROWS, count),
            "column": column,
            "activation": strongest,
            "activations": lists,
            "center": np.full(count, BESIDE),
        }
    )
    pq.write_table(table, track.analyses_dir / "semantics" / "contexts.parquet")


def _profile(track: Track, steps: Sequence[int], features: int, rng: np.random.Generator) -> None:
    grid, kept = _grid(steps, features), 5
    counts, near, tokens = grid.copy(), grid.copy(), grid.copy()
    counts["counts"] = list(rng.poisson(3, (len(grid), 24)))
    near["nearest"] = list(rng.integers(0, features, (len(grid), kept)))
    near["cosines"] = list(rng.uniform(0.2, 0.8, (len(grid), kept)).astype(np.float32))
    words = np.array([f" word{i}" for i in range(4096)], dtype=object)
    for side in ("raised", "lowered"):
        tokens[side] = list(words[rng.integers(0, len(words), (len(grid), kept))])
        tokens[f"{side}_by"] = list(rng.normal(0, 1, (len(grid), kept)).astype(np.float32))
    edges = [2 ** (i / 4 - 2) for i in range(25)]
    _save(track, "profile", {"activations": counts, "nearest": near, "logits": tokens}, {"bin_edges": edges})


def _grid(steps: Sequence[int], features: int) -> pd.DataFrame:
    return pd.DataFrame({"step": np.repeat(steps, features), "feature": np.tile(np.arange(features), len(steps))})


def _save(track: Track, name: str, tables: dict[str, pd.DataFrame], settings: dict[str, Any] | None = None) -> None:
    AnalysisResult(tables=tables, settings=settings or {}, summary="Made up.").save(track.analyses_dir / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoints", type=int, default=30)
    parser.add_argument("--features", type=int, default=4096)
    options = parser.parse_args()
    build(options.folder, options.checkpoints, options.features)
