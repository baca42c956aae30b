"""Print the figures of a file of JSON lines, each with its bar and whether it holds.

python benchmarks/table.py FILE
"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines() if line.startswith("{")]
    for facts in lines:
        value = facts.get("ratio", facts.get("value"))
        size = f" d_sae {facts['d_sae']}" if "d_sae" in facts else ""
        verdict = f"bar {facts['bar']:<6} {'holds' if facts['holds'] else 'DOES NOT HOLD'}" if "bar" in facts else ""
        name = f"{facts['benchmark']}: {facts['figure']}{size} ({facts['allocator']} allocator)"
        print(f"{name:<95} {value:<8} {verdict}".rstrip())
    with_bar = [facts for facts in lines if "bar" in facts]
    print(f"{sum(facts['holds'] for facts in with_bar)} of {len(with_bar)} bars hold.")
