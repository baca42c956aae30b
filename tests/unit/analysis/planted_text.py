"""Text with topics, and latents that answer to a word, to a topic, or to both: what semantics should tell apart."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import scipy.sparse
import torch

from saetrack.analysis.base import AnalysisResult, Observation, SplitObservation, SweepAnalysis
from saetrack.lm.tokens import TokenRows

WORDS, TOPICS, ROWS, CONTEXT = 240, 8, 600, 32
FREQUENT = 20  # words eight times as frequent as the others
TOPICAL = 0.3  # share of a document's words that are of its topic; each topic has ten words of its own
CLASS_OF = {"token": "token", "context": "token-in-context", "concept": "concept", "scattered": "unresolved"}
"""What a planted kind is. A ``token`` latent fires at some word, at 40 to 100 % of its positions; a ``context`` one
at a word in documents of one topic; a ``concept`` one at twelve words in documents of one topic, and one time in ten
elsewhere; a ``scattered`` one at twelve words anywhere, so it has no meaning that these analyses could find."""
COUNTS = {"token": 40, "context": 20, "concept": 40, "scattered": 20}
_NOISE = 0.02  # firings for no reason, for each that has one


class PlantedText:
    """Rows of two splits, and the latents on them.

    Args:
        seed: Of every draw.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.kinds = tuple(kind for kind, count in COUNTS.items() for _ in range(count))
        rng = np.random.default_rng([seed, 20])
        # the words of topics themselves are nobody's; one word must be frequent, or its latent would be insufficient
        first, rare = 1 + 10 * TOPICS, 1 + 10 * TOPICS + FREQUENT
        one, many = np.arange(first, rare), np.arange(rare, WORDS)
        answers = {"token": (one, 1), "context": (one, 1), "concept": (many, 12), "scattered": (many, 12)}
        self._words = [rng.choice(answers[kind][0], size=answers[kind][1], replace=False) for kind in self.kinds]
        self._topic = rng.integers(TOPICS, size=len(self.kinds))
        self._share = rng.uniform(0.4, 1.0, size=len(self.kinds))

    def split(self, number: int) -> SplitObservation:
        """The selection rows (0) or the evaluation rows (1)."""
        rng = np.random.default_rng([self.seed, 21, number])
        topic = rng.integers(TOPICS, size=ROWS)
        own = 1 + 10 * topic[:, None] + rng.integers(10, size=(ROWS, CONTEXT))
        words = np.arange(1 + 10 * TOPICS, WORDS)
        weights = np.where(words < 1 + 10 * TOPICS + FREQUENT, 8.0, 1.0)
        other = rng.choice(words, p=weights / weights.sum(), size=(ROWS, CONTEXT))
        tokens = np.where(rng.random((ROWS, CONTEXT)) < TOPICAL, own, other).astype(np.int32)
        tokens[:, 0] = 0
        documents = np.repeat(np.arange(ROWS, dtype=np.int32)[:, None], CONTEXT, axis=1)
        positions = np.argwhere(tokens != 0)
        token, about = tokens[positions[:, 0], positions[:, 1]], topic[positions[:, 0]]
        columns = []
        for kind, words, of, share in zip(self.kinds, self._words, self._topic, self._share, strict=True):
            fires = np.isin(token, words)
            if kind == "token":
                fires &= rng.random(len(token)) < share
            elif kind == "context":
                fires &= about == of
            elif kind == "concept":
                fires &= (about == of) | (rng.random(len(token)) < 0.1 / (TOPICS - 1))
            else:
                fires &= rng.random(len(token)) < 1 / TOPICS
            fires |= rng.random(len(token)) < _NOISE * fires.mean()
            columns.append(fires * (0.5 + rng.random(len(token))))
        latents = scipy.sparse.csr_array(np.stack(columns, axis=1).astype(np.float32))
        rows = TokenRows(tokens, documents, 0)
        return SplitObservation(rows, positions, np.zeros((len(positions), 2), dtype=np.float32), latents)


class Words:
    """A tokenizer: token 7 is ' w7'. No two of these words are of one family."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"w{i}" for i in ids]

    def decode(self, ids: list[int], **_: object) -> str:
        return f" w{ids[0]}"


class _Track(list[Any]):
    path = Path("planted")

    def tokenizer(self) -> Words:
        return Words()

    def controls(self, kind: str | None = None) -> list[Any]:
        return []


def observe(analysis: SweepAnalysis, text: PlantedText) -> AnalysisResult:
    """Two LLM checkpoints with the same latents, the last one first, as `run_analyses` shows them."""
    track: Any = _Track(SimpleNamespace(step=step, position=step) for step in (0, 1))
    embeddings = torch.from_numpy(np.random.default_rng(text.seed).normal(size=(WORDS, 16)))
    analysis.begin(track)
    for snapshot in (track[1], track[0]):
        analysis.observe(snapshot, Observation(text.split(0), text.split(1), embeddings))
    return analysis.finish()
