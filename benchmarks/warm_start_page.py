"""The tables and figures of docs/warm-starts.md, from the lines that warm_starts.py wrote.

python benchmarks/warm_start_page.py OUT/results.jsonl docs

Replaces what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` in docs/warm-starts.md, and draws
docs/warm-starts.svg and docs/warm-starts-frontier.svg.
"""

import argparse
import re
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from warm_starts import ARMS, BUDGETS, CLIMBING, COLD, DEFAULT, FIRST, FRONTIER, HELD, IN_LONG, LONG, read_lines

from saetrack.analysis import figures

Line = dict[str, Any]
NAMES = {DEFAULT: "transported + continuity 1.0", HELD: "transported + continuity 2.0"}
"""What some arms are called on the page."""


class Lines:
    """The results, by what they are of.

    Args:
        file: results.jsonl.
    """

    def __init__(self, file: Path) -> None:
        self.all: list[Line] = read_lines(file)

    def of(
        self,
        arm: str,
        llm: str = "4 layers",
        sae: str = "TopK",
        thin: int = 1,
        *,
        ladder: bool = False,
        budget: int = 1,
    ) -> list[Line]:
        """One line for each seed."""
        wanted = {"llm": llm, "sae": sae, "thin": thin, "arm": arm, "budget": budget}
        found = [line for line in self.all if wanted.items() <= line.items()]
        found.sort(key=lambda line: "rungs" not in line)  # a ladder has no null steps: its line only where no other is
        lines = {line["seed"]: line for line in found if not ladder or "rungs" in line}
        return [lines[seed] for seed in sorted(lines)]


def values(line: Line, name: str, stages: slice = slice(1, None)) -> list[float]:
    """One number for each stage."""
    return [trained[name] for trained in line["stages"][stages]]


def spread(numbers: Iterable[float], form: str = ".2f") -> str:
    """The mean over seeds, with the least and the largest where there are several."""
    numbers = list(numbers)
    if not numbers:
        return "-"
    text = f"{np.mean(numbers):{form}}"
    if f"{min(numbers):{form}}" == f"{max(numbers):{form}}":
        return text
    return f"{text} ({min(numbers):{form}} to {max(numbers):{form}})"


def markdown(rows: list[dict[str, str]]) -> str:
    """A table; all columns but the first to the right."""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row[name] for name in head) + " |" for row in rows])


def starts(lines: Lines, thin: int, llm: str = "4 layers", sae: str = "TopK") -> str:
    """What every start does on one grid: means over the stages after the first."""
    rows = []
    for arm in (DEFAULT, *ARMS):
        runs = lines.of(arm, llm, sae, thin)
        if runs:
            row = {"start": f"**{NAMES[arm]}**" if arm == DEFAULT else NAMES.get(arm, arm), "seeds": str(len(runs))}
            row["FVU before"] = spread((np.mean(values(run, "fvu_before")) for run in runs), ".3f")
            row["FVU after"] = spread((np.mean(values(run, "fvu")) for run in runs), ".4f")
            row["dead, worst"] = spread((max(values(run, "dead")) for run in runs), ".0%")
            row["r, mean"] = spread(np.mean(values(run, "r")) for run in runs)
            row["kept > 0.5"] = spread((np.mean(values(run, "above_half")) for run in runs), ".0%")
            row["first to last > 0.5"] = spread((run["first_to_last"]["above_half"] for run in runs), ".1%")
            row["> 0.7"] = spread((run["first_to_last"]["above_0.7"] for run in runs), ".1%")
            rows.append(row)
    return markdown(rows)


def by_stage(lines: Lines) -> str:
    """The dense grid, stage by stage: `prior`, the default, the cold SAE and the ceiling; means over seeds."""
    runs = {arm: lines.of(arm) for arm in ("prior", "transported", DEFAULT, HELD)}
    steps = [trained["step"] for trained in runs["prior"][0]["stages"]][1:]
    table: dict[str, list[str]] = {}

    def add(name: str, lists: list[list[float]], form: str) -> None:
        table[name] = [f"{np.mean(numbers):{form}}" for numbers in zip(*lists, strict=True)]

    cold = lines.of(COLD)
    add(f"FVU, cold, {FIRST:,} tokens", [values(run, "fvu") for run in cold], ".4f")
    add("FVU, scratch", [values(run, "fvu") for run in lines.of("scratch")], ".4f")
    for name, form in (("fvu", ".4f"), ("dead", ".0%"), ("r", ".2f"), ("above_half", ".0%")):
        title = {"fvu": "FVU", "dead": "dead", "r": "r", "above_half": "kept > 0.5"}[name]
        for arm, found in runs.items():
            add(f"{title}, {NAMES.get(arm, arm)}", [values(run, name) for run in found], form)
        for arm in ("prior", DEFAULT) if name in ("r", "above_half") else ():
            nulls = [run["null_steps"] for run in lines.of(arm) if "null_steps" in run]
            if nulls:
                add(
                    f"{title}, null step of {NAMES.get(arm, arm)}",
                    [[again[name] for again in null] for null in nulls],
                    form,
                )
    rows = [{"LLM step": name, **dict(zip(map(str, steps), cells, strict=True))} for name, cells in table.items()]
    return markdown(rows)


def ladder(lines: Lines, thin: int, budget: int = 1) -> str:
    """FVU of a warm SAE over that of a cold one, by LLM step, for shares of the cold one's tokens."""
    rows = []
    for arm in CLIMBING:
        for run in lines.of(arm, thin=thin, ladder=True, budget=budget):
            for rung in run["rungs"]:
                row = {"start": NAMES.get(arm, arm), "seed": str(run["seed"]), "LLM step": str(rung["step"])}
                row |= {"cold FVU": f"{rung['cold']:.4f}"}
                for share in ("0.1", "0.25", "0.5", "1.0"):
                    fvu = rung["fvu"].get(share)
                    row[f"{float(share):.0%} of its tokens"] = "" if fvu is None else f"{fvu / rung['cold']:.2f}"
                rows.append(row)
    return markdown(rows) if rows else "Not measured."


def long_stages(lines: Lines) -> str:
    """The dense grid with `LONG` times the tokens, stage by stage, and what is kept from first to last."""
    rows = []
    places = (("4 layers", "TopK"), ("6 layers", "TopK"), ("4 layers", "Standard"))
    for (llm, sae), arm in product(places, (COLD, "prior", "transported", *IN_LONG)):
        for run in lines.of(arm, llm, sae, budget=LONG):
            row = {"LLM, SAE": f"{llm}, {sae}", "seed": str(run["seed"])}
            row["start"] = NAMES.get(arm, arm).replace("package,", "transported + continuity")
            row |= {str(trained["step"]): f"{trained['fvu']:.4f}" for trained in run["stages"][1:]}
            row["dead, worst"] = f"{max(values(run, 'dead')):.0%}"
            kept = run.get("first_to_last")
            row["first to last > 0.5"] = f"{kept['above_half']:.1%}" if kept else ""
            rows.append(row)
    return markdown(rows) if rows else "Not measured."


def frontier(lines: Lines) -> str:
    """FVU against identity for the forms and weights of continuity, on the dense grid, seed 0."""
    prior = lines.of("prior")[0]
    held = sorted([HELD, *FRONTIER], key=lambda arm: "package, 2.0" if arm == HELD else arm)
    names = ["prior", "transported", *held]
    rows = []
    for arm in names:
        for run in lines.of(arm)[:1]:
            relative = np.array(values(run, "fvu")) / np.array(values(prior, "fvu"))
            row = {"form, weight": f"**{arm}**" if arm == DEFAULT else "package, 2.0" if arm == HELD else arm}
            row["FVU / prior, mean"] = f"{np.exp(np.log(relative).mean()):.3f}"
            row["worst"] = f"{relative.max():.3f}"
            row["dead, worst"] = f"{max(values(run, 'dead')):.0%}"
            row["r, mean"] = f"{np.mean(values(run, 'r')):.2f}"
            row["kept > 0.5"] = f"{np.mean(values(run, 'above_half')):.0%}"
            row["first to last > 0.5"] = f"{run['first_to_last']['above_half']:.1%}"
            rows.append(row)
    return markdown(rows)


def budgets(lines: Lines) -> str:
    """Fixed budgets and such that follow convergence, on the dense grid."""
    rows = []
    for arm in (DEFAULT, *BUDGETS):
        for run in lines.of(arm)[:1]:
            fvu = values(run, "fvu")
            rows.append(
                {
                    "budget": "25,000 tokens" if arm == DEFAULT else arm,
                    "tokens in all": f"{sum(values(run, 'tokens')):,}",
                    "FVU, geometric mean": f"{np.exp(np.log(fvu).mean()):.4f}",
                    "FVU, last": f"{fvu[-1]:.4f}",
                    "tokens by stage, thousands": " ".join(f"{t / 1000:.0f}" for t in values(run, "tokens")),
                }
            )
    return markdown(rows)


def draw_series(lines: Lines, path: Path) -> None:
    """FVU, median correlation and share kept by LLM step, each seed a line."""
    figure, axes = figures.small_multiples(3, columns=3, title="Every LLM checkpoint, TopK; one line for each seed")
    colours = {"prior": figures.VERMILION, "transported": figures.SKY, DEFAULT: figures.GREEN, HELD: figures.BLUE}
    steps = [trained["step"] for trained in lines.of("prior")[0]["stages"]][1:]
    for ax, name, what in zip(
        axes, ("fvu", "r", "above_half"), ("FVU after", "median correlation r", "share kept, r > 0.5"), strict=True
    ):
        for arm, colour in colours.items():
            for i, run in enumerate(lines.of(arm)):
                figures.line(ax, steps, values(run, name), color=colour, label=None if i else NAMES.get(arm, arm))
                if name != "fvu" and "null_steps" in run:
                    label = None if i else f"null step of {NAMES.get(arm, arm)}"
                    drawn = [again[name] for again in run["null_steps"]]
                    ax.plot(figures.step_position(steps), drawn, ":", color=colour, label=label)
        if name == "fvu":
            for i, run in enumerate(lines.of(COLD)):
                figures.line(ax, steps, values(run, name), color=figures.BLACK, label=None if i else "cold, 5 x tokens")
            figures.log_y(ax)
        figures.step_axis(ax, steps)
        titles = {"fvu": "Variance left out", "r": "To the snapshot before", "above_half": "Features kept in one stage"}
        figures.describe(ax, title=titles[name], ylabel=what)
        figures.legend(ax, columns=1)
    figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})


def draw_frontier(lines: Lines, path: Path) -> None:
    """Every form of continuity as a point, FVU against the share of features that are kept."""
    figure, axes = figures.small_multiples(2, title="FVU against identity, every LLM checkpoint, seed 0")
    prior = lines.of("prior")[0]
    shown = [arm for arm in FRONTIER if lines.of(arm) and arm.split(",")[0] not in ("half", "quarter")]
    forms = list(dict.fromkeys(arm.split(",")[0] for arm in shown))
    for ax, what in zip(axes, ("stage", "track"), strict=True):
        for arm in ("prior", "transported", HELD, *shown):
            for run in lines.of(arm)[:1]:
                ratio = np.array(values(run, "fvu")) / np.array(values(prior, "fvu"))
                x = float(np.exp(np.log(ratio).mean()))
                y = np.mean(values(run, "above_half")) if what == "stage" else run["first_to_last"]["above_half"]
                form = arm.split(",")[0] if arm in FRONTIER else "package"
                colour = figures.BLACK if arm in ("prior", "transported") else figures.PALETTE[forms.index(form)]
                ax.plot(
                    x, y, "o" if arm in ARMS else "^" if "fading" in arm or "half" in arm else "s", color=colour, ms=5
                )
                name = {HELD: "2.0"}.get(arm, arm.split(", ", 1)[-1].replace("half of the stage", "half"))
                ax.annotate(name, (x, y), textcoords="offset points", xytext=(4, 3), fontsize=6)
        for form in forms:
            ax.plot([], [], "s", color=figures.PALETTE[forms.index(form)], label=form.replace("_", " "))
        title = "kept from one stage to the next" if what == "stage" else "kept from first to last"
        figures.describe(ax, title=title, ylabel="share with r > 0.5", xlabel="FVU over that of prior, geometric mean")
        figures.style(ax)
        figures.legend(ax, columns=3)
    figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    """Bring the page up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("docs", type=Path)
    options = parser.parse_args()
    lines = Lines(options.results)
    tables = {
        "by stage": by_stage(lines),
        "ladder 1": ladder(lines, 1),
        "ladder 8": ladder(lines, 8),
        "long": long_stages(lines),
        "ladder long": ladder(lines, 1, LONG),
        "frontier": frontier(lines),
        "budgets": budgets(lines),
    }
    for name, (llm, sae) in {
        "": ("4 layers", "TopK"),
        " Standard": ("4 layers", "Standard"),
        " 6": ("6 layers", "TopK"),
    }.items():
        for thin in (1, 2, 4, 8):
            if lines.of("prior", llm, sae, thin):
                tables[f"starts {thin}{name}"] = starts(lines, thin, llm, sae)
    page = options.docs / "warm-starts.md"
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        block = f"<!-- begin {name} -->\n\n{table}\n\n<!-- end {name} -->"
        text, found = re.subn(f"<!-- begin {name} -->.*?<!-- end {name} -->", lambda _, b=block: b, text, flags=re.S)
        if not found:
            print(f"\n{name}\n{table}")
    page.write_text(text, encoding="utf-8")
    draw_series(lines, options.docs / "warm-starts.svg")
    if any(lines.of(arm) for arm in FRONTIER):
        draw_frontier(lines, options.docs / "warm-starts-frontier.svg")


if __name__ == "__main__":
    main()
