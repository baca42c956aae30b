"""What goes wrong on the Hub, and that a download goes on: against a Hub on this machine, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]

SCRIPT = """
import contextlib, json, logging, os, sys, types
from tests.hub_server import HubServer

hub = HubServer()
os.environ.update(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", HF_HOME=sys.argv[1], HF_HUB_DISABLE_PROGRESS_BARS="1")
from huggingface_hub import constants
from saetrack.lm import files, hub_cache, hub_listing

constants.DOWNLOAD_CHUNK_SIZE = 1000  # of 10 MB: what has come of a chunk that is not whole is asked for again
for step in range(12):
    hub.branches[f"step{step}"] = {
        "config.json": json.dumps({"step": step}).encode(), "model.safetensors": f"weights {step}".encode() * 999
    }
said = {}

def fetch(name, revision):
    hub.asked.clear()
    try:
        folder = files.fetch("me/llm", revision)
    except (OSError, ValueError) as error:
        said[name] = {"error": f"{type(error).__name__}: {error}", "asked": list(hub.asked)}
    else:
        content = {p.name: p.read_bytes() for p in folder.iterdir()}
        said[name] = {"whole": content == hub.branches[revision], "asked": list(hub.asked)}

pauses = []
hub_cache.time = types.SimpleNamespace(sleep=pauses.append)
hub.faults = {
    "INFO step0": [503, {"Retry-After": "7"}, {"RateLimit": '"api";r=0;t=55'}, "cut"],
    "GET step1/model.safetensors": [429],
    "GET step2/model.safetensors": ["cut"],
    "GET step3/model.safetensors": [503],
    "GET step4/model.safetensors": ["flip"],
    "GET step5/model.safetensors": [503] * 5,
}
fetch("busy for a revision", "step0")
said["pauses"] = list(pauses)
fetch("busy for a file, 429", "step1")
fetch("cut", "step2")
fetch("busy for a file, 503", "step3")
fetch("flipped", "step4")
fetch("flipped, again", "step4")
fetch("down", "step5")
fetch("down, again", "step5")
hub_listing.hub_files("me/llm", "step6")
gone = hub.branches.pop("step6")
fetch("gone", "step6")
fetch("there already", "step3")

files.downloads_for = "this run"
for step in (8, 9, 10, 11):
    fetch("of this run", f"step{step}")
files.downloads_for = None
revisions = {s: hub_cache.CachedRevision("me/llm", hub.commit(f"step{s}")) for s in (3, 8, 9, 10, 11)}
for revision in revisions.values():
    revision.let_go()
code = f'''
import sys
from saetrack.lm import hub_cache
hub_cache.CachedRevision("me/llm", "{revisions[9].commit}").hold()
print("held", flush=True)
sys.stdin.read()
'''
import subprocess
other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
other.stdout.readline()
refs = revisions[10].folder.parents[1] / "refs"
(refs / "tag").write_text(revisions[10].commit)
twin = revisions[11].folder.with_name("f" * 40)
twin.mkdir()
(twin / "model.safetensors").symlink_to(os.readlink(revisions[11].folder / "model.safetensors"))
evicted = {s: r.evict("this run", [f"step{s}"]) for s, r in revisions.items()}
evicted["8 again, by another run"] = revisions[8].evict("another run", ["step8"])
there = {s: (r.folder / "model.safetensors").is_file() for s, r in revisions.items()}
other.stdin.close()
other.wait()
evicted["9, released"] = revisions[9].evict("this run", ["step9"])
said["eviction"] = {"evicted": evicted, "there": there, "twin": (twin / "model.safetensors").is_file()}
fetch("evicted, fetched again", "step8")

def look():
    now = watcher.look()
    looks.append([[c.step for c in now.series], now.ended, now.unfinished])

from saetrack.lm.checkpoints import HubSource
looks = []
watcher = HubSource("me/llm", watch=True).watcher
index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
hub.branches["step12"] = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()}
hub.branches["step12"]["model-1.safetensors"] = b"a"
look()
hub.branches["step12"]["model-2.safetensors"] = b"b"
look()
hub.branches["main"] = {"done": b""}
look()
said["watched"] = looks

hub.stop()
fetch("no network, asked before", "step3")
hub_listing.forget_hub()
log = []
handler = logging.Handler()
handler.emit = lambda record: log.append(record.getMessage())
logging.getLogger("saetrack").addHandler(handler)
branches = hub_listing.hub_branches("me/llm")
local = {s: files.local_folder("me/llm", f"step{s}") for s in range(12)}
held = [s for s, folder in local.items() if folder and files.fetch("me/llm", f"step{s}") == folder]
said["no network"] = {"branches": branches, "held": held, "log": log}
fetch("no network, not in the cache", "step9")
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What happened, by the name of the trouble."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path_factory.mktemp("hf"))],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return answer


WEIGHTS = "model.safetensors"


@pytest.mark.parametrize(
    ("trouble", "asked"),
    [
        ("busy for a revision", ["INFO step0"] * 5 + ["GET step0/config.json", f"GET step0/{WEIGHTS}"]),
        ("busy for a file, 429", ["INFO step1", "GET step1/config.json", *[f"GET step1/{WEIGHTS}"] * 2]),
        ("busy for a file, 503", ["INFO step3", "GET step3/config.json", *[f"GET step3/{WEIGHTS}"] * 2]),
        (
            "cut",
            ["INFO step2", "GET step2/config.json", f"GET step2/{WEIGHTS}", f"GET step2/{WEIGHTS} from 4000"],
        ),
    ],
)
def test_passing_trouble_is_sat_out_and_what_has_come_is_not_asked_for_again(
    said: dict[str, dict[str, Any]], trouble: str, asked: list[str]
) -> None:
    assert said[trouble] == {"whole": True, "asked": asked}


def test_the_pause_is_the_one_that_the_hub_names(said: dict[str, Any]) -> None:
    assert said["pauses"] == [0.0, 7.0, 56.0, 8.0]  # Retry-After, the same, RateLimit, and none: the fourth of our own


def test_a_file_with_other_bytes_is_refused_and_fetched_anew(said: dict[str, dict[str, Any]]) -> None:
    error = said["flipped"]["error"]
    assert error.startswith("ValueError: me/llm@step4: model.safetensors was damaged on its way: its SHA-256 is ")
    assert error.endswith("removed from the cache: run the same command again (`fit` with `--ckpt_path last`).")
    assert said["flipped, again"] == {"whole": True, "asked": [f"GET step4/{WEIGHTS}"]}


def test_a_hub_that_stays_down_is_one_line_and_what_is_whole_is_kept(said: dict[str, dict[str, Any]]) -> None:
    error = said["down"]["error"]
    assert error.startswith(f"OSError: The download of {WEIGHTS} of me/llm@step5 broke off (Server error '503 ")
    assert "\n" not in error
    assert said["down"]["asked"].count(f"GET step5/{WEIGHTS}") == 5
    assert said["down, again"] == {"whole": True, "asked": [f"GET step5/{WEIGHTS}"]}


def test_a_revision_that_vanishes_is_one_line(said: dict[str, dict[str, Any]]) -> None:
    error = said["gone"]["error"]
    assert error.startswith("FileNotFoundError: The Hub no longer has config.json of me/llm@step6. Leave the LLM ")
    assert "\n" not in error


def test_what_is_there_is_not_asked_for(said: dict[str, dict[str, Any]]) -> None:
    assert said["there already"] == {"whole": True, "asked": []}


def test_only_what_the_run_downloaded_and_nobody_else_needs_is_evicted(said: dict[str, dict[str, Any]]) -> None:
    assert said["eviction"] == {
        "evicted": {
            "3": False,  # in the cache before
            "8": True,
            "9": False,  # another process holds it
            "10": False,  # a tag names it too
            "11": True,
            "8 again, by another run": False,
            "9, released": True,
        },
        "there": {"3": True, "8": False, "9": True, "10": True, "11": False},
        "twin": True,  # which shares its weights with that of step 11
    }
    assert said["evicted, fetched again"]["whole"]


def test_a_branch_counts_when_all_its_shards_are_there_and_done_on_main_ends_the_series(said: dict[str, Any]) -> None:
    before, whole, done = said["watched"]
    steps = [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert before[:2] == [steps, False]
    assert before[2].startswith("me/llm@step12 lacks 1 of the 2 weight files in model.safetensors.index.json")
    assert whole == [[*steps, 12], False, None]
    assert done == [[*steps, 12], True, None]


def test_without_a_network_the_cache_is_the_series_and_one_line_says_so(said: dict[str, dict[str, Any]]) -> None:
    assert said["no network, asked before"] == {"whole": True, "asked": []}
    alone = said["no network"]
    assert alone["branches"] == [f"step{s}" for s in (0, 1, 10, 12, 2, 3, 4, 5, 8)] + ["tag"]
    assert alone["held"] == [0, 1, 2, 3, 4, 5, 8, 10]
    assert len(alone["log"]) == 1
    assert alone["log"][0].startswith("The Hub cannot be reached (")
    assert alone["log"][0].endswith("; going on with what its cache holds of me/llm.")
    assert "is neither a folder here nor in the Hub's cache" in said["no network, not in the cache"]["error"]
