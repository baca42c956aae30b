"""How near neighbours must be for a tenth of a cold SAE's tokens to suffice: one LLM, four distances.

make bench-warm-starts

From LLM step 512 to 1,024 of a `saetrack pretrain FOLDER --steps 1280 --every 16`, whose learning rate is constant
there, series with 16 to 128 steps between neighbours, each later stage with a tenth of the first one's tokens. Prints
a table for docs/warm-starts.md: FVU over that of a cold SAE at the same LLM checkpoint.
"""

import argparse
from pathlib import Path

from warm_start_page import markdown
from warm_start_series import Arm, HarvestedData, Trained, cold, run_series
from warm_starts import FIRST, HOOKPOINTS, recipe

FROM, TO = 512, 1024
CHECKED = range(FROM + 128, TO + 1, 128)
GAPS = (128, 64, 32, 16)
ARMS = {"transported": 0.0, "transported + continuity 1.0": 1.0, "prior": 0.0}


def main() -> None:
    """Train the series and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llm", type=Path)
    parser.add_argument("out", type=Path, help="Where activations and cold SAEs are kept.")
    options = parser.parse_args()
    data = HarvestedData(options.llm, options.out / "late", HOOKPOINTS["4 layers"], round(1.06 * FIRST))

    def fresh(step: int) -> Trained:
        place = data.place(data.at(step))
        return cold(data, recipe("TopK", 0), place, options.out / "cold" / f"late-step{step}.safetensors")

    fvu = {step: fresh(step).measures["fvu"] for step in CHECKED}
    rows = []
    for name, continuity in ARMS.items():
        arm = Arm(name.split(" ")[0], continuity, tokens=FIRST // 10)
        for gap in GAPS:
            result = run_series(data, recipe("TopK", 0), arm, fresh(FROM), list(range(FROM, TO + 1, gap)))
            row = {"start": name, "LLM steps apart": str(gap)}
            row |= {str(s["step"]): f"{s['fvu'] / fvu[s['step']]:.3f}" for s in result["stages"] if s["step"] in fvu}
            row["r, last stage"] = f"{result['stages'][-1]['r']:.2f}"
            row["first to last > 0.5"] = f"{result['first_to_last']['above_half']:.0%}"
            rows.append(row)
    rows.append(dict.fromkeys(rows[0], "") | {"start": "cold FVU"} | {str(s): f"{fvu[s]:.4f}" for s in CHECKED})
    print(markdown(rows))


if __name__ == "__main__":
    main()
