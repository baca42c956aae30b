"""Peak memory of a TopK step, each side in a process of its own.

python benchmarks/step_memory.py [--d_sae 32768]
"""

import argparse
import json
import resource
import subprocess
import sys

from measuring import installed, report

D_IN, BATCH, K = 512, 4096, 32


def peak_mib() -> float:
    """Largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(side: str, d_sae: int) -> None:
    """Take a few steps and print the peak with and without what the imports hold."""
    from ours import activations, step_of
    from peers import sparsify

    from saetrack.sae import TopKSAE

    batches = activations(BATCH, D_IN)
    if side == "peer":
        from sparsify import SparseCoder  # noqa: F401  imported before the line that is subtracted
    imports = peak_mib()
    step = step_of(TopKSAE(D_IN, d_sae // D_IN, K)) if side == "ours" else sparsify(D_IN, d_sae, K)
    for x in batches:
        step(x)
    print(json.dumps({"process": peak_mib(), "step": peak_mib() - imports}))


def measure(side: str, d_sae: int) -> dict[str, float]:
    """Peak MiB of one side: of its whole process, and of what training adds to the imports."""
    command = [sys.executable, __file__, "--d_sae", str(d_sae), "--side", side]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    facts: dict[str, float] = json.loads(output.splitlines()[-1])
    return facts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d_sae", type=int, default=32768)
    parser.add_argument("--side", choices=["ours", "peer"])
    asked = parser.parse_args()
    if asked.side:
        run(asked.side, asked.d_sae)
    else:
        ours, peer = (measure(side, asked.d_sae) for side in ("ours", "peer"))
        report(
            "step_memory",
            "topk_against_sparsify",
            d_in=D_IN,
            d_sae=asked.d_sae,
            batch=BATCH,
            k=K,
            peer=installed("eai-sparsify"),
            ratio=round(ours["step"] / peer["step"], 3),
            bar=0.5,
            at_most=True,
            ours_mib=round(ours["step"]),
            peer_mib=round(peer["step"]),
            ours_process_mib=round(ours["process"]),
            peer_process_mib=round(peer["process"]),
        )
