"""Print the figures of files of JSON lines, each with its bar and whether it holds, as a table in Markdown.

    python benchmarks/table.py FILE ...

Lines come from `measuring.report`; any benchmark that prints such lines can be added to `make bench`.
"""

import json
import sys
from pathlib import Path
from typing import Any

DISTINGUISH = ("class", "d_sae", "seeds", "allocator")
"""Facts by which lines of one figure differ, shown behind its name."""


def row(facts: dict[str, Any]) -> str:
    """One figure as a row."""
    at = ", ".join(f"{name} {facts[name]}" for name in DISTINGUISH if name in facts)
    bar = f"{facts['direction']} {facts['bar']}" if "bar" in facts else ""
    verdict = {True: "holds", False: "**does not hold**", None: ""}[facts.get("holds")]
    return f"| {facts['benchmark']} | {facts['figure']} | {at} | {facts['value']} | {bar} | {verdict} |"


def main(files: list[str]) -> None:
    """Print the table, what it was measured with, and how many bars hold."""
    lines = [line for file in files for line in Path(file).read_text().splitlines() if line.startswith("{")]
    figures = [json.loads(line) for line in lines]
    print("| benchmark | figure | of | value | bar | |\n|---|---|---|---:|---|---|")
    for facts in figures:
        print(row(facts))
    for name in ("device", "threads", "torch", "peer"):
        print(f"{name}: {', '.join(sorted({str(facts[name]) for facts in figures if name in facts}))}")
    loads = [facts["load"] for facts in figures]
    print(f"load of the machine in the minute before each figure: {min(loads)} to {max(loads)}")
    with_bar = [facts for facts in figures if "bar" in facts]
    print(f"{sum(facts['holds'] for facts in with_bar)} of {len(with_bar)} bars hold.")


if __name__ == "__main__":
    main(sys.argv[1:])
