"""A track over a series on the Hub: fetched ahead, evicted behind, broken off and gone on with, without a network."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import contextlib, hashlib, io, json, os, sys, time, warnings
from pathlib import Path
from tests.hub_server import HubServer

config, series, home = map(Path, sys.argv[1:])
hub = HubServer()
os.environ.update(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_HOME=str(home), HF_HUB_DISABLE_PROGRESS_BARS="1")
warnings.filterwarnings("error", "Cannot enable progress bars")
for folder in series.iterdir():
    hub.branches[folder.name] = {file.name: file.read_bytes() for file in folder.iterdir()}
from saetrack.cli import main
from saetrack.lm import files, hub_listing
from saetrack.track import Track

said = []
run = Path(json.loads(config.with_suffix(".json").read_text())["run"])

def fit(*options):
    hub.asked.clear()
    hub_listing.forget_hub()
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(["fit", "--config", str(config), *options])
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
    weights = [asked for asked in hub.asked if asked.endswith("safetensors")]
    cached = sorted(p.parent.name for p in home.glob("hub/models--*/snapshots/*/model.safetensors"))
    names = {hub.commit(b): b for b in hub.branches}
    said.append({
        "code": code, "error": error.getvalue(), "weights": weights, "cached": sorted(names[c] for c in cached),
        "steps": Track.open(run).steps,
        "llms": [[s.metadata["llm"]["commit"], s.metadata["llm"]["weight_hash"]] for s in Track.open(run)],
    })

files.fetch("me/llm", "step0")
hub.faults["GET step2/model.safetensors"] = ["cut"]
hub.faults["GET step4/model.safetensors"] = [503] * 10
fit()
fit("--ckpt_path", "last")
wanted = [hub.branches[f"step{step}"]["model.safetensors"] for step in (0, 1, 2, 4, 10)]
said[-1]["commits"] = [hub.commit(f"step{step}") for step in (0, 1, 2, 4, 10)]
said[-1]["hashes"] = ["sha256:" + hashlib.sha256(content).hexdigest() for content in wanted]
hub.stop()
fit("--scheduler.track_dir", str(run) + "-again", "--scheduler.steps", "[4,10]")
print(json.dumps(said))
"""


@pytest.mark.slow
def test_a_series_on_the_hub_is_fetched_ahead_evicted_behind_and_gone_on_with_after_trouble(
    config: dict[str, Any], write: Callable[[dict[str, Any]], Path], tiny_series: Path, tmp_path: Path
) -> None:
    config["data"]["source"] = {"class_path": "HubSource", "init_args": {"repo": "me/llm"}}
    config["scheduler"]["steps"] = [0, 1, 2, 4, 10]
    config["hub"] = {"keep_checkpoints": 3}
    path = write(config)
    path.with_suffix(".json").write_text(json.dumps({"run": config["scheduler"]["track_dir"]}))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path), str(tiny_series), str(tmp_path / "hf")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    broken, continued, alone = json.loads(done.stdout)
    assert broken["code"] == 1
    assert broken["error"].startswith("saetrack: error: The download of model.safetensors of me/llm@step4 broke off (")
    assert len(broken["error"].splitlines()) == 1
    assert broken["steps"] == [0, 1, 2]
    asked = [line.removesuffix("/model.safetensors") for line in broken["weights"]]
    # twice what was cut; step 4 once in the background and once more before its stage, five times each
    assert asked == ["GET step1", *["GET step2"] * 2, *["GET step4"] * 10]
    assert broken["cached"] == ["step0", "step1", "step2"]
    assert continued["code"] == 0, continued["error"]
    assert continued["steps"] == [0, 1, 2, 4, 10]
    assert [line.split("/")[0] for line in continued["weights"]] == ["GET step4", "GET step10"]
    assert continued["llms"] == [list(pair) for pair in zip(continued["commits"], continued["hashes"], strict=True)]
    assert continued["cached"] == ["step0", "step10", "step4"], "step 0 was there before the run"
    assert alone["code"] == 0, alone["error"]
    assert alone["error"].startswith("The Hub cannot be reached (")
    assert len(alone["error"].splitlines()) == 1
    assert alone["weights"] == []
