"""Side-by-side timing: every variant takes its turn in every round, so that a busy machine is busy for all of them."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch


@dataclass
class Timing:
    """What the rounds of one variant took.

    Args:
        wall: Seconds of each round.
        cpu: Seconds of processor time, summed over threads: what counts when others use the machine too.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def facts(self, name: str) -> dict[str, float]:
        """Medians and the spread, in milliseconds, with the variant's name in the keys."""
        low, _, high = statistics.quantiles(self.wall, n=4) if len(self.wall) > 1 else [self.wall[0]] * 3
        return {
            f"{name}_ms": round(1e3 * statistics.median(self.wall), 2),
            f"{name}_iqr_ms": round(1e3 * (high - low), 2),
            f"{name}_cpu_ms": round(1e3 * statistics.median(self.cpu), 2),
        }


def interleaved(variants: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, Timing]:
    """Run all variants one after another, again and again.

    Args:
        variants: What to time, by name.
        rounds: How often each is timed.
        warm_up: Rounds before that, which are not.
    """
    timings = {name: Timing() for name in variants}
    for i in range(warm_up + rounds):
        for name, run in variants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= warm_up:
                timings[name].wall.append(time.perf_counter() - wall)
                timings[name].cpu.append(time.process_time() - cpu)
    return timings


def ratio(slow: Timing, fast: Timing) -> dict[str, float]:
    """How many times longer ``slow`` takes: of the median times, and of the median processor times."""
    return {
        "ratio": round(statistics.median(slow.wall) / statistics.median(fast.wall), 2),
        "cpu_ratio": round(statistics.median(slow.cpu) / statistics.median(fast.cpu), 2),
    }


def machine() -> dict[str, Any]:
    """What a figure depends on beside the code."""
    with open("/proc/cpuinfo") as lines:
        model = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
        )
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else model,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "allocator": "tuned" if "MALLOC_TRIM_THRESHOLD_" in os.environ else "default",
    }


def report(benchmark: str, figure: str, **facts: Any) -> None:
    """Print one figure as one line of JSON, which `table.py` reads.

    Args:
        benchmark: Name of the script, without its ending.
        figure: What was measured.
        facts: ``ratio`` or ``value``, the figure, which becomes ``value``; ``bar``, where there is one, with
            ``at_most=True`` for an upper one, from which come ``direction`` and ``holds`` (``holds=False`` says that
            it does not, whatever the figure); and whatever else belongs to it.
    """
    at_most = facts.pop("at_most", False)
    line: dict[str, Any] = {"benchmark": benchmark, "figure": figure, "value": facts.pop("ratio", None)}
    if line["value"] is None:
        line["value"] = facts.pop("value")
    if "bar" in facts:
        bar = facts.pop("bar")
        holds = facts.pop("holds", True) and (line["value"] <= bar if at_most else line["value"] >= bar)
        line |= {"bar": bar, "direction": "at most" if at_most else "at least", "holds": bool(holds)}
    print(json.dumps({**line, **facts, **machine()}), flush=True)


def installed(package: str) -> str:
    """Name and version of a peer."""
    return f"{package} {version(package)}"
