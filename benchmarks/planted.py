"""A series of LLM checkpoints whose features are known: what the analyses should find, planted in the weights.

python benchmarks/planted.py FOLDER --steps 0 1 2 4 8 16 32 64 --seed 0

FOLDER then holds ``step0``, ``step1``, ... (Hugging Face checkpoints of a GPT-2 with one layer), ``corpus.txt`` (one
document a line), and the truth: ``truth.json`` and ``truth.safetensors``. The hookpoint is ``transformer.h.0.mlp``.

Write v for the token at a position and c for the class of the token before it. The activation at checkpoint t is

    x_t(v, c) = sum_f  a_f(t) S_f(t, v, c) d_f(t)  +  noise_t,

with a planted feature's direction d_f (unit), its amplitude a_f (0 before its onset and after its end), and its
strength S_f, which is above 0 where the feature answers to (v, c) and 0 elsewhere. How the weights make this:

* Token and position embeddings are codes of ones and minus ones (positions: cosines and sines) in blocks of their own.
  All have mean 0 and one norm, so a layer norm is a multiplication by a constant.
* The one attention head looks at the position before: its queries are the positions' codes turned by one place. It
  writes the class of the token there into a block of the residual stream.
* The MLP has one hidden unit for each (v, c). The product of the token's code with that of v is 1, or at most 1/2 for
  another token, that of the classes 1, or at most 0; so ``relu(2 (product + product) - 3)`` is 1 at (v, c) and 0
  elsewhere. The output weights of the unit are the sum above. They are all that differs between checkpoints.
* Noise comes from further hidden units with random weights on all blocks: a fixed function of token, class and
  position, whose directions have nothing to do with the features'.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

Floats = NDArray[np.floating]
Integers = NDArray[np.integer]

HOOKPOINT = "transformer.h.0.mlp"
GROUPS, GROUP_SIZE, CLASSES = 40, 6, 7
WORDS = GROUPS * GROUP_SIZE  # BOS comes before them, with the id 0 and a class of its own
CONTEXT = 64  # positions of the LLM
FREQUENT = 4  # every fourth word is four times as frequent as the others, and can have a feature of its own
TOPICAL = 0.3  # share of a document's words that are of its topic, which is a group of words
BLOCKS = {"token": 16, "class": 8, "before": 8, "group": 8, "position": 16}
D_IN = sum(BLOCKS.values())
NOISE_UNITS = 256
SHARPNESS = 200.0  # of attention: the next best position keeps exp(-50) of the weight

COUNTS = {"token": 60, "group": 40, "context": 20, "scattered": 24, "swapped": 20, "never": 16}
"""Features of each kind. A ``group`` is of words with like embeddings that share documents; a ``context`` feature
answers to a group after two of the seven classes; ``scattered`` words have nothing in common; a ``swapped`` feature
keeps its direction, but changes its words with its partner's half-way; ``never`` has a direction and words, but no
amplitude."""
ANSWERED = 0.6
"""Share of the pairs of word and class that a feature answers to, but for ``context`` features, which answer to all.
Were it 1, a word's feature would never be without its group's, and no autoencoder could tell the two apart."""
TOGETHER = 0.75
"""Largest share of a feature's firings at which a certain other one fires too. One that fires only with another is
nested in it: then their sum is as good a direction as its own, and an autoencoder with one active latent fewer."""


@dataclass(frozen=True)
class Plan:
    """What is planted.

    Args:
        steps: LLM steps of the checkpoints.
        seed: Of every draw.
        documents: Lines of the corpus, each of 30 to 70 words.
        noise: Root mean square norm of the noise; a feature's contribution has norms from 0.7 to 1.3.
        rotation: Radians by which the whole space turns between neighbours; every vector turns by exactly this.
        drift: Radians by which a feature's own direction turns at each transition (one number for all transitions, or
            one for each), on average over features, which differ by a factor from 0.5 to 1.5.
        formed_at_init: Share of the features whose onset is the first checkpoint; the others' are spread over the
            series, but for its last three checkpoints.
        dying: Share of the single-token features that end half-way.
        features: False plants noise only, so that nothing ever forms.
    """

    steps: tuple[int, ...]
    seed: int = 0
    documents: int = 6000
    noise: float = 0.3
    rotation: float = 0.2
    drift: tuple[float, ...] = (0.1,)
    formed_at_init: float = 0.4
    dying: float = 0.25
    features: bool = True

    def __post_init__(self) -> None:
        if len(self.steps) < 2 or any(b <= a for a, b in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError(f"--steps is {list(self.steps)}; give at least two steps, each above the one before.")
        if len(self.drift) not in (1, len(self.steps) - 1):
            raise ValueError(
                f"--drift has {len(self.drift)} numbers for {len(self.steps) - 1} transitions; give one for all, or "
                "one for each."
            )

    @property
    def half(self) -> int:
        """Position of the checkpoint from which swapped features have each other's words, and dying ones none."""
        return len(self.steps) // 2


@dataclass(frozen=True)
class Truth:
    """What was planted, for T checkpoints, F features, V = 241 token ids, C = 8 classes of the token before.

    Args:
        plan: The plan.
        kinds: Kind of each feature.
        onset: Position of the first checkpoint with the feature, T for none, ``[F]``.
        end: Position of the first checkpoint without it again, T for none, ``[F]``.
        partner: Whose words it has from half-way on; itself but for swapped features, ``[F]``.
        strengths: ``[F, V, C]``, before any swap.
        directions: Unit vectors, ``[T, F, d_in]``.
        rotations: Orthogonal, ``[T, d_in, d_in]``: ``d(t - 1) @ rotations[t]`` is where the common rotation alone takes
            a direction; the first is the identity.
        classes: Class of each token id, ``[V]``.
    """

    plan: Plan
    kinds: tuple[str, ...]
    onset: Integers
    end: Integers
    partner: Integers
    strengths: Floats
    directions: Floats
    rotations: Floats
    classes: Integers

    @property
    def amplitudes(self) -> Floats:
        """``[T, F]``, 0 or 1."""
        t = np.arange(len(self.plan.steps))[:, None]
        return ((t >= self.onset) & (t < self.end)).astype(np.float64)

    def strengths_at(self, position: int) -> Floats:
        """Strength of every feature times its amplitude at one checkpoint, ``[F, V, C]``."""
        strengths = self.strengths if position < self.plan.half else self.strengths[self.partner]
        return strengths * self.amplitudes[position][:, None, None]

    def latents(self, position: int, tokens: Integers) -> Floats:
        """What ideal latents would be on token rows.

        Args:
            position: Of the checkpoint.
            tokens: ``[rows, context]``, each row beginning with BOS.

        Returns:
            ``[rows, context, F]``; those at the first column, BOS, have no meaning.
        """
        before = self.classes[np.roll(tokens, 1, axis=1)]
        return np.moveaxis(self.strengths_at(position)[:, tokens, before], 0, -1)

    def activations(self, position: int, tokens: Integers) -> Floats:
        """The planted sum on token rows, without noise, ``[rows, context, d_in]``."""
        found: Floats = self.latents(position, tokens) @ self.directions[position]
        return found

    def own_drift(self) -> Floats:
        """``1 - cos`` of each feature's own turn into each checkpoint, ``[T, F]``; NaN for the first."""
        turned = np.einsum("tfd,tde->tfe", self.directions[:-1], self.rotations[1:])
        cosines = np.einsum("tfd,tfd->tf", turned, self.directions[1:])
        return np.concatenate([np.full((1, len(self.kinds)), np.nan), 1 - cosines])

    def save(self, folder: Path) -> None:
        """Write ``truth.json`` and ``truth.safetensors``."""
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, folder / "truth.safetensors")
        vocabulary = ["<bos>", *_words(np.random.default_rng([self.plan.seed, 1]))]
        steps = [*self.plan.steps, None]
        features = [
            {
                "feature": f,
                "kind": kind,
                "tokens": [vocabulary[v] for v in np.flatnonzero(self.strengths[f].any(axis=1))],
                "classes_before": np.flatnonzero(self.strengths[f].any(axis=0)).tolist(),
                "onset": steps[self.onset[f]],
                "end": steps[self.end[f]],
                "partner": int(self.partner[f]),
            }
            for f, kind in enumerate(self.kinds)
        ]
        facts = {"plan": asdict(self.plan), "hookpoint": HOOKPOINT, "swap": steps[self.plan.half], "features": features}
        (folder / "truth.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Truth":
        """Read what :meth:`save` wrote."""
        facts = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
        plan = {name: tuple(value) if isinstance(value, list) else value for name, value in facts["plan"].items()}
        kinds = tuple(feature["kind"] for feature in facts["features"])
        return cls(Plan(**plan), kinds, **load_file(folder / "truth.safetensors"))


def plant(folder: Path, plan: Plan) -> Truth:
    """Write the checkpoints, the corpus and the truth of a plan.

    Raises:
        FileExistsError: If the folder holds a truth already.
    """
    if (folder / "truth.json").exists():
        raise FileExistsError(f"{folder} already holds a planted series; choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    truth = _draw(plan)
    words = _words(np.random.default_rng([plan.seed, 1]))
    (folder / "corpus.txt").write_text(_corpus(words, plan), encoding="utf-8")
    tokenizer = _tokenizer(words)
    llm = _detectors(truth.classes, plan)
    noise = np.random.default_rng([plan.seed, 2]).normal(size=(NOISE_UNITS, D_IN))
    noise *= plan.noise * np.sqrt(2 / (NOISE_UNITS * D_IN))  # a rectified unit normal has mean square 1/2
    for position, step in enumerate(plan.steps):
        events = np.einsum("fvc,fd->vcd", truth.strengths_at(position)[:, 1:], truth.directions[position])
        noise = noise @ truth.rotations[position]
        output = np.concatenate([events.reshape(-1, D_IN), noise])
        llm.transformer.h[0].mlp.c_proj.weight.data = torch.from_numpy(output).float()
        llm.save_pretrained(folder / f"step{step}")
        tokenizer.save_pretrained(folder / f"step{step}")
    truth.save(folder)
    return truth


def _draw(plan: Plan) -> Truth:
    """Which features there are, when, and where they point."""
    rng = np.random.default_rng([plan.seed, 0])
    kinds = tuple(kind for kind, count in COUNTS.items() for _ in range(count))
    kind, last = np.array(kinds), len(plan.steps)
    classes = np.concatenate([[CLASSES], rng.permutation(np.arange(WORDS) % CLASSES)])
    strengths = _answers(kind, rng)
    strengths *= _answered(strengths, kind, _pair_shares(classes), rng)
    strengths *= rng.uniform(0.7, 1.3, size=strengths.shape)
    late = rng.integers(1, max(2, last - 3), size=len(kinds))
    onset = np.where((rng.random(len(kinds)) < plan.formed_at_init) | (kind == "swapped"), 0, late)
    dies = (kind == "token") & (rng.random(len(kinds)) < plan.dying) & (onset < plan.half)
    end = np.where(dies, plan.half, last)
    onset = np.where((kind == "never") | (not plan.features), last, onset)
    partner = np.arange(len(kinds))
    pairs = np.flatnonzero(kind == "swapped").reshape(-1, 2)
    partner[pairs] = pairs[:, ::-1]
    directions, rotations = _directions(plan, len(kinds), rng)
    return Truth(plan, kinds, onset, end, partner, strengths, directions, rotations, classes)


def _answers(kind: NDArray[np.str_], rng: np.random.Generator) -> Floats:
    """1 where a feature answers to a token after a class, ``[F, V, C]``."""
    answers = np.zeros((len(kind), WORDS + 1, CLASSES + 1))
    group = lambda g: 1 + GROUP_SIZE * (g % GROUPS) + np.arange(GROUP_SIZE)  # noqa: E731
    singles = np.arange(1, WORDS + 1, FREQUENT)  # the frequent words
    of = np.arange(GROUPS)
    for name in COUNTS:
        for nth, f in enumerate(np.flatnonzero(kind == name)):
            if name == "token":
                answers[f, singles[nth]] = 1
            elif name == "group":
                answers[f, group(nth)] = 1
            elif name == "context":
                chosen = rng.choice(CLASSES, size=2, replace=False)
                answers[f, group(nth)[:, None], chosen] = 1
            else:  # one word from each of several groups
                second = name == "swapped" and nth % 2  # partners share no word
                of = np.setdiff1d(np.arange(GROUPS), of) if second else np.arange(GROUPS)
                of = rng.choice(of, size=GROUP_SIZE, replace=False)
                answers[f, 1 + GROUP_SIZE * of + rng.integers(GROUP_SIZE, size=GROUP_SIZE)] = 1
    return answers


def _answered(answers: Floats, kind: NDArray[np.str_], shares: Floats, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which pairs of word and class a feature does answer to, ``[F, V, C]``; drawn until no feature is nested."""
    free = (kind != "context")[:, None, None]

    def draw() -> NDArray[np.bool_]:
        return (rng.random(answers.shape) < ANSWERED) | ~free

    found = draw()
    for _ in range(1000):
        wrong = np.argwhere(fires_with((answers * found).reshape(len(kind), -1) > 0, shares.ravel()) > TOGETHER)
        if not len(wrong):
            return found
        again = np.unique(wrong)  # both of a pair: one may be a context feature, which answers to all
        found[again] = draw()[again]
    raise RuntimeError(f"Some features still share more than {TOGETHER} of their firings; choose another seed.")


def fires_with(fires: NDArray[np.bool_], shares: Floats) -> Floats:
    """Share of each feature's firings at which each other one fires too.

    Args:
        fires: Where each fires, ``[F, P]``.
        shares: How much each of the P places counts.

    Returns:
        ``[F, F]``: of row's firings, those with column's; 0 on the diagonal.
    """
    both = (fires * shares) @ fires.T
    together: Floats = both / np.maximum(np.diag(both), np.finfo(np.float64).tiny)[:, None]
    np.fill_diagonal(together, 0)
    return together


def _frequency() -> Floats:
    """Share of each word among those that are not of a document's topic, ``[WORDS]``."""
    frequency = np.where(np.arange(WORDS) % FREQUENT, 1.0, 4.0)
    return frequency / frequency.sum()


def _pair_shares(classes: Integers) -> Floats:
    """Share of positions with each pair of token and class of the token before, ``[V, C]``, BOS and topics aside."""
    words = np.concatenate([[0.0], TOPICAL / WORDS + (1 - TOPICAL) * _frequency()])
    return np.outer(words, np.bincount(classes, weights=words, minlength=CLASSES + 1))


def _directions(plan: Plan, count: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Unit directions ``[T, F, d_in]`` and the common rotation into each checkpoint ``[T, d_in, d_in]``."""
    basis = scipy.linalg.qr(rng.normal(size=(D_IN, D_IN)))[0]
    turn = np.array([[np.cos(plan.rotation), np.sin(plan.rotation)], [-np.sin(plan.rotation), np.cos(plan.rotation)]])
    rotation = basis @ np.kron(np.eye(D_IN // 2), turn) @ basis.T  # turns every vector by the same angle
    factors = rng.uniform(0.5, 1.5, size=(count, 1))
    angles = plan.drift * (len(plan.steps) - 1) if len(plan.drift) == 1 else plan.drift
    here = _unit(rng.normal(size=(count, D_IN)))
    directions = [here]
    for angle in angles:
        aside = rng.normal(size=here.shape)
        aside = _unit(aside - (aside * here).sum(axis=1, keepdims=True) * here)
        here = (np.cos(angle * factors) * here + np.sin(angle * factors) * aside) @ rotation
        directions.append(here)
    rotations = np.stack([np.eye(D_IN), *[rotation] * (len(plan.steps) - 1)])
    return np.stack(directions), rotations


def _unit(vectors: Floats) -> Floats:
    found: Floats = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return found


def _detectors(classes: Integers, plan: Plan) -> GPT2LMHeadModel:
    """The LLM but for the MLP's output weights: it finds the token and the class of the one before."""
    rng = np.random.default_rng([plan.seed, 3])
    at, start = {}, 0
    for block, width in BLOCKS.items():
        at[block] = slice(start, start + width)
        start += width
    tokens = _balanced_codes(WORDS + 1, BLOCKS["token"], rng)
    hadamard = scipy.linalg.hadamard(BLOCKS["class"])[1:]
    class_codes = np.concatenate([hadamard, -hadamard[:1]])  # the last is BOS's
    group_codes = _balanced_codes(GROUPS + 1, BLOCKS["group"], rng)
    positions = _position_codes()
    embedding = np.zeros((WORDS + 1, D_IN))
    embedding[:, at["token"]], embedding[:, at["class"]] = tokens, class_codes[classes]
    embedding[:, at["group"]] = group_codes[np.concatenate([[GROUPS], np.arange(WORDS) // GROUP_SIZE])]
    # the norm that layer norm divides by, before and after attention; one for all tokens and positions
    squares = (embedding[0] ** 2).sum() + (positions[0] ** 2).sum()
    first, second = np.sqrt(squares / D_IN), np.sqrt((squares + BLOCKS["class"]) / D_IN)

    attention = np.zeros((D_IN, 3, D_IN))
    attention[at["position"], 0, at["position"]] = np.linalg.pinv(positions[1:]) @ positions[:-1]
    attention[at["position"], 1, at["position"]] = SHARPNESS * np.eye(BLOCKS["position"])
    attention[at["class"], 2, at["before"]] = first * np.eye(BLOCKS["class"])
    hidden = np.zeros((D_IN, WORDS, CLASSES + 1))
    hidden[at["token"]] = 2 * second * tokens[1:].T[:, :, None] / BLOCKS["token"]
    hidden[at["before"]] = 2 * second * class_codes.T[:, None, :] / BLOCKS["class"]
    hidden = np.concatenate([hidden.reshape(D_IN, -1), rng.normal(size=(D_IN, NOISE_UNITS)) / np.sqrt(D_IN)], axis=1)
    bias = np.where(np.arange(hidden.shape[1]) < WORDS * (CLASSES + 1), -3.0, 0.0)

    llm = _empty_llm(hidden.shape[1])
    weights = {
        "transformer.wte.weight": embedding,
        "transformer.wpe.weight": np.pad(positions, ((0, 0), (at["position"].start, 0))),
        "transformer.h.0.attn.c_attn.weight": attention.reshape(D_IN, -1),
        "transformer.h.0.attn.c_proj.weight": np.eye(D_IN),
        "transformer.h.0.mlp.c_fc.weight": hidden,
        "transformer.h.0.mlp.c_fc.bias": bias,
    }
    state = llm.state_dict()
    for name, weight in weights.items():
        state[name].copy_(torch.from_numpy(weight))
    return llm


def _empty_llm(hidden: int) -> GPT2LMHeadModel:
    """A GPT-2 of one layer and one head, with all weights 0 but the layer norms'."""
    config = GPT2Config(
        vocab_size=WORDS + 1,
        n_positions=CONTEXT,
        n_embd=D_IN,
        n_layer=1,
        n_head=1,
        n_inner=hidden,
        activation_function="relu",
        layer_norm_epsilon=1e-12,
        bos_token_id=0,
        eos_token_id=0,
    )
    llm = GPT2LMHeadModel(config).eval()
    for name, parameter in llm.named_parameters():
        parameter.data.fill_(float(".ln_" in name and name.endswith("weight")))
    return llm


def _balanced_codes(count: int, width: int, rng: np.random.Generator) -> Floats:
    """Codes of as many ones as minus ones, two of which agree in at most three quarters of the places."""
    codes: list[Floats] = []
    while len(codes) < count:
        code = rng.permutation(np.repeat([1.0, -1.0], width // 2))
        if all(code @ other <= width // 2 for other in codes):
            codes.append(code)
    return np.stack(codes)


def _position_codes() -> Floats:
    """Cosines and sines with their negatives, so that a code has mean 0; a turn moves all of them by one place."""
    angles = 2 * np.pi * np.outer(np.arange(CONTEXT), [1, 7, 20, 29]) / CONTEXT
    codes = np.stack([np.cos(angles), -np.cos(angles), np.sin(angles), -np.sin(angles)], axis=2)
    return codes.reshape(CONTEXT, -1)


def _words(rng: np.random.Generator) -> list[str]:
    """Invented words, no two with the same first four letters."""
    words: dict[str, str] = {}
    while len(words) < WORDS:
        word = "".join(rng.choice(list("bdfgklmnprtvz")) + rng.choice(list("aeiou")) for _ in range(3))
        words.setdefault(word[:4], word)
    return list(words.values())


def _corpus(words: Sequence[str], plan: Plan) -> str:
    """Documents of random words, one a line; some words of each are of its topic."""
    rng = np.random.default_rng([plan.seed, 4])
    frequency = _frequency()
    lines = []
    for _ in range(plan.documents):
        length = rng.integers(30, 71)
        topic = GROUP_SIZE * rng.integers(GROUPS) + rng.integers(GROUP_SIZE, size=length)
        drawn = np.where(rng.random(length) < TOPICAL, topic, rng.choice(WORDS, p=frequency, size=length))
        lines.append(" ".join(words[i] for i in drawn))
    return "\n".join(lines) + "\n"


def _tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<bos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<bos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<bos>")


def main(arguments: Sequence[str] | None = None) -> None:
    """Plant a series and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=Plan.documents)
    parser.add_argument("--noise", type=float, default=Plan.noise, help="root mean square norm")
    parser.add_argument("--rotation", type=float, default=Plan.rotation, help="radians at each transition")
    parser.add_argument("--drift", type=float, nargs="+", default=list(Plan.drift), help="radians, for all or for each")
    parser.add_argument("--noise-only", action="store_true", help="plant no features")
    options: dict[str, Any] = vars(parser.parse_args(arguments))
    folder, noise_only = options.pop("folder"), options.pop("noise_only")
    options |= {"steps": tuple(options["steps"]), "drift": tuple(options["drift"])}
    try:
        truth = plant(folder, Plan(**options, features=not noise_only))
    except (ValueError, FileExistsError) as error:
        parser.exit(1, f"planted.py: error: {error}\n")
    print(json.dumps({"folder": str(folder), "features": len(truth.kinds), "checkpoints": len(truth.plan.steps)}))


if __name__ == "__main__":
    main()
