"""Formation: when the positions of a feature become alike, against random positions with the same tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .base import AnalysisResult, Observation, Probe, SweepAnalysis
from .formation_figures import CAPTIONS, formed_figure, map_figure, paper_figure, progress_figure
from .formation_measure import FormationMeter, Measured
from .formation_paper import PaperSets, Progress, measure_paper, paper_tables
from .formation_sets import BASELINES, FormationSets
from .formation_tables import Findings, feature_table, formation_table, population, positions_table, share_table
from .formation_times import FORMED, MIN_CHECKPOINTS, STATUSES
from .places import share_a_step

if TYPE_CHECKING:
    import pandas as pd

    from saetrack.track import Snapshot, Track

CHOICE = (
    "Positions of the evaluation rows, at most one of a document, without BOS, repeated contexts, and tokens or places "
    "that occur once: half above the 99 % quantile of the feature's activations on the selection rows, the others "
    "uniform above their median, all at the last snapshot."
)


class Formation(SweepAnalysis):
    """When each feature forms: how alike its positions are at every LLM checkpoint, against random positions.

    The last snapshot chooses a feature's positions ``P_i``; thresholds are from the selection rows and positions from
    the evaluation rows. At checkpoint t progress is ``M_i(t) = Sbar(P_i) - mean_b Sbar(R_b)``: ``Sbar`` is the mean
    cosine over pairs of the LLM's activations, centred by their mean, and the ``R_b`` are random sets that match
    ``P_i`` in its tokens, or in its places in the row, or in its size alone (*uniform*). The random sets, and the
    documents' weights of the Dirichlet bootstrap, are the same at every checkpoint. p-values hold for all checkpoints
    together (maxT); over features at most 5 % of the discoveries are false (Benjamini-Hochberg).

    The time of formation is where ``M`` has risen by half of its amplitude (``formed_step``; by 0.9,
    ``formed90_step``), plateau less first checkpoint, to stay there, interpolated in ``log10(step + 1)``. Its 95 %
    interval is from the bootstrap; the two checkpoints around it (``formed_after``, ``formed_by``) bound it whatever
    the curve does between them. ``status``, the first that holds:

    * ``never``: at no checkpoint more alike than random positions with the same tokens. So is a feature of one token
      that does not ask for a context, by design; against the uniform baseline it may be formed.
    * ``transient``: was higher before its plateau, by 3 standard errors and by 0.3 of the peak.
    * ``at-init``: alike at the first checkpoint, and no rise of 2 standard errors since.
    * ``not plateaued``: as formed, but still moving over the last three checkpoints: half of a level that is not known
      yet has no time, so it has no ``formed_step`` and counts as not formed by the last checkpoint.
    * ``formed``: a rise of 3 standard errors and a finite interval.
    * ``unresolved``: none of these. ``insufficient``: fires in too few documents.

    False features (random positions with the tokens of features drawn at random) go through the same rule; the share of
    them that is called formed is given beside every result. The paper's own measures, on its positions, are in the
    tables ``paper`` and ``paper_population``.

    Restricted (``--only_kept``), the features are computed whose index kept its identity in every stage: of the others
    the curve is that of positions at which another feature fired before.

    Args:
        selection_rows: Token rows that thresholds are taken from.
        evaluation_rows: Token rows that positions are chosen from and measured on.
        n_positions: Most positions of a feature.
        n_min: Features with fewer positions are ``insufficient``.
        draws: Random sets of each kind, B. Memory: see the module formation_measure.
        replicates: Bootstrap replicates, R.
        baseline: ``token``, ``position`` or ``uniform``: the random sets that times and statuses are taken against.
        seed: Of the choice, the random sets and the bootstrap.

    Raises:
        ValueError: If a number is out of range or ``baseline`` is none.
    """

    restrictable: ClassVar[bool] = True

    def __init__(
        self,
        selection_rows: int = 256,
        evaluation_rows: int = 1024,
        n_positions: int = 64,
        n_min: int = 20,
        draws: int = 200,
        replicates: int = 500,
        baseline: str = "token",
        seed: int = 0,
    ) -> None:
        if not 3 <= n_min <= n_positions:
            raise ValueError(
                f"formation needs 3 <= n_min <= n_positions, but n_min is {n_min} and n_positions is {n_positions}."
            )
        given = {"selection_rows": selection_rows, "evaluation_rows": evaluation_rows}
        at_least = {**dict.fromkeys(given, 1), "draws": 20, "replicates": 20}
        given |= {"draws": draws, "replicates": replicates}
        for name, value in given.items():
            if value < at_least[name]:
                raise ValueError(f"formation's {name} is {value}; it must be at least {at_least[name]}.")
        if baseline not in BASELINES:
            raise ValueError(f"formation's baseline {baseline!r} is none; choose one of {', '.join(BASELINES)}.")
        self.settings: dict[str, Any] = {
            **given,
            "n_positions": n_positions,
            "n_min": n_min,
            "baseline": baseline,
            "false_discovery_rate": 0.05,
            "false_features": 200,
            "seed": seed,
        }
        self._meter: FormationMeter | None = None

    def begin(self, track: Track) -> Probe:
        """Forget any earlier sweep and ask for the rows.

        Raises:
            ValueError: If LLM steps repeat, as in a control of one LLM checkpoint: nothing can form there.
        """
        if share_a_step(track.steps):
            raise ValueError(
                f"{track.path} follows one LLM checkpoint several times (LLM steps {track.steps}), so nothing forms in "
                "it; formation needs increasing LLM steps. Run it on the track that this one controls."
            )
        self._last_step = track.steps[-1]
        self._meter = None
        self._measured: dict[int, Measured] = {}
        self._paper: dict[int, dict[str, Progress]] = {}
        return Probe(self.settings["selection_rows"], self.settings["evaluation_rows"])

    def observe(self, snapshot: Snapshot, observation: Observation) -> None:
        """Choose the positions on the last snapshot, which comes first; measure at every one.

        Raises:
            RuntimeError: If another snapshot comes first.
        """
        selection, evaluation = observation.selection, observation.evaluation
        if selection is None or evaluation is None or (self._meter is None and snapshot.step != self._last_step):
            raise RuntimeError(
                f"Formation chooses its positions on both splits of the last snapshot (LLM step {self._last_step}), "
                f"which the sweep must show first; it showed LLM step {snapshot.step}."
            )
        if self._meter is None:
            settings = self.settings
            chosen = {name: settings[name] for name in ("n_positions", "n_min", "draws", "false_features", "seed")}
            counts = None if self.kept is None else self.kept.throughout
            sets = FormationSets.choose(selection, evaluation, **chosen, counts=counts)
            self._meter = FormationMeter(sets, settings["baseline"], settings["replicates"], settings["seed"])
            self._paper_sets = PaperSets.choose(evaluation, settings["seed"])
            self._positions = positions_table(evaluation, sets)
            self._rows_read = {
                split: {"rows": len(seen.rows.tokens), "documents": len(np.unique(seen.documents))}
                for split, seen in (("selection", selection), ("evaluation", evaluation))
            }
        centre = evaluation.activations.mean(axis=0, dtype=np.float64)
        self._measured[snapshot.step] = self._meter.measure(evaluation.activations, centre)
        self._paper[snapshot.step] = measure_paper(evaluation, self._paper_sets)

    def finish(self) -> AnalysisResult:
        """Put the checkpoints in order, and say which features have formed when.

        Raises:
            RuntimeError: If nothing was observed.
        """
        if self._meter is None:
            raise RuntimeError("Formation has seen no snapshot; call observe for each one before finish.")
        settings, sets = self.settings, self._meter.sets
        steps = sorted(self._measured)
        measured = [self._measured[step] for step in steps]
        findings = Findings.of(
            steps, measured, self._meter.max_t, settings["baseline"], settings["false_discovery_rate"]
        )
        rng = np.random.default_rng([settings["seed"], 4])
        features = feature_table(sets, findings)
        mean = population(measured, steps, ~sets.false, rng, settings["replicates"])
        shares = share_table(sets, findings, rng, settings["replicates"])
        tables = {
            "features": features,
            "formation": formation_table(sets, measured, findings),
            "population": mean,
            "formed": shares,
            "positions": self._positions,
            **paper_tables(self._paper_sets, self._paper, rng, None if self.kept is None else self.kept.throughout),
        }
        real = ~sets.false
        figures = {"paper": paper_figure(tables["paper_population"], steps)}
        if real.any():
            figures["progress"] = progress_figure(mean, steps)
            curves, when = findings.progress[:, real], findings.formed_index()[real]
            figures["map"] = map_figure(curves, when, steps, settings["baseline"])
        if findings.available and real.any():
            figures["formed"] = formed_figure(shares, features["status"].value_counts(), steps)
        scalars = {
            f"progress_{name}": dict(zip(steps, mean.loc[mean["baseline"] == name, "mean"], strict=True))
            for name in BASELINES
        }
        if findings.available:
            scalars["share_formed"] = dict(zip(steps, shares["share"], strict=True))
        recorded = {**settings, "choice": CHOICE, "rows_read": self._rows_read, "statuses": list(STATUSES)}
        recorded["status_of_false_features"] = findings.count(sets.false)
        return AnalysisResult(tables, figures, scalars, recorded, self._summary(features, findings), CAPTIONS)

    def _summary(self, features: pd.DataFrame, findings: Findings) -> str:
        assert self._meter is not None
        sets, settings = self._meter.sets, self.settings
        computed = int((~sets.false).sum())
        if not computed and not sets.counts.all():
            return f"None of the {int(sets.counts.sum())} features that kept their identity has positions enough."
        if not computed:
            return (
                f"No feature has {settings['n_min']} positions in as many documents of the evaluation rows "
                f"({self._rows_read['evaluation']['documents']} documents), so formation was not computed. Give the "
                "track a longer corpus, or lower `n_min`."
            )
        alike = int(findings.significant[:, ~sets.false].any(axis=0).sum())
        text = (
            f"{alike} of {computed} features have positions more alike than random ones matched by "
            f"{settings['baseline']} at some checkpoint; {int(sets.counts.sum()) - computed} have too few positions."
        )
        if not findings.available:
            return (
                f"{text} Formed steps are not available: they need {MIN_CHECKPOINTS} LLM checkpoints and the track has "
                f"{len(findings.steps)}; follow more with `saetrack fit`."
            )
        counts = features["status"].value_counts()
        named = ", ".join(f"{counts[name]} {name}" for name in STATUSES[:-1] if counts.get(name))
        false = findings.count(sets.false)
        formed = features.loc[features["status"] == FORMED, "formed_step"]
        median = f" (median step {formed.median():,.0f})" if len(formed) else ""
        return (
            f"{text} {named}{median}. Of {sum(false.values())} false features {false.get(FORMED, 0)} count as formed."
        )
