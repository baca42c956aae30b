import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from saetrack.lm.audit import audit, describe_checkpoints, format_audit, problems
from saetrack.lm.checkpoints import FolderSource, LLMCheckpoint, weight_hash


@pytest.fixture
def faulty(tmp_path: Path, make_series: Callable[..., Path]) -> FolderSource:
    """Steps 0, 1, 2 with equal weights as Pythia has them, step 4 truncated, step 10 without weights, step 11 good."""
    make_series(tmp_path, steps=[0, 4, 10, 11])
    for step in (1, 2):
        shutil.copytree(tmp_path / "step0", tmp_path / f"step{step}")
    weights = tmp_path / "step4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    (tmp_path / "step10" / "model.safetensors").unlink()
    return FolderSource(tmp_path)


def test_a_good_series_has_no_problems(tiny_series: Path) -> None:
    series = FolderSource(tiny_series).checkpoints()
    rows = audit(series)
    assert [row.checkpoint for row in rows] == series
    assert [row.weight_hash for row in rows] == [weight_hash(checkpoint) for checkpoint in series]
    assert len({row.weight_hash for row in rows}) == 5
    assert problems(rows) == []


def test_repeated_missing_and_truncated_weights_are_found(faulty: FolderSource) -> None:
    rows = audit(faulty.checkpoints())
    assert {row.checkpoint.step: row.equal_to for row in rows} == {0: None, 1: 0, 2: 0, 4: None, 10: None, 11: None}
    assert [row.checkpoint.step for row in rows if row.fault] == [4, 10]
    assert [row.checkpoint.step for row in rows if row.weight_hash is None] == [4, 10]


def test_each_problem_is_one_line_that_names_the_checkpoint(faulty: FolderSource) -> None:
    truncated, missing, first, second = problems(audit(faulty.checkpoints()))
    assert "step 4 " in truncated
    assert "truncated" in truncated
    assert "step 10 " in missing
    assert "has no weights" in missing
    assert "same weights as that of step 0" in first
    assert "step 2 " in second
    assert not any("\n" in line for line in (truncated, missing, first, second))


def test_the_table_has_a_line_for_each_checkpoint_and_the_problems_below(faulty: FolderSource) -> None:
    rows = audit(faulty.checkpoints())
    lines = format_audit(rows).splitlines()
    assert lines[0].split() == ["step", "tokens", "LLM", "checkpoint", "commit", "weights", "equal", "to"]
    assert lines[2].split()[-2:] == ["step", "0"]
    assert "FAULT" in lines[4]
    assert lines[7] == ""
    assert lines[8:] == problems(rows)


def test_without_the_audit_only_names_are_read(faulty: FolderSource) -> None:
    text = describe_checkpoints(faulty)
    assert [line.split()[0] for line in text.splitlines()] == ["step", "0", "1", "2", "4", "10", "11"]
    assert "FAULT" not in text
    assert describe_checkpoints(faulty, audit=True).startswith(format_audit(audit(faulty.checkpoints())) + "\n\n")
    assert describe_checkpoints(faulty, select="0,4").splitlines()[1:] == [text.splitlines()[1], text.splitlines()[4]]


def test_weights_without_a_configuration_are_a_fault(tmp_path: Path, make_series: Callable[..., Path]) -> None:
    make_series(tmp_path, steps=[0, 4])
    (tmp_path / "step4" / "config.json").unlink()
    good, bad = audit(FolderSource(tmp_path).checkpoints())
    assert good.fault is None
    assert bad.weight_hash is None
    assert "step4 has weights but no config.json" in (bad.fault or "")
    (tmp_path / "step4" / "config.json").write_text('{"model_type": ')
    assert f"{tmp_path / 'step4' / 'config.json'} is damaged" in (
        audit(FolderSource(tmp_path).checkpoints())[1].fault or ""
    )


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_weights_that_are_no_numbers_are_a_fault(safe: bool, tmp_path: Path, make_series: Callable[..., Path]) -> None:
    make_series(tmp_path, steps=[0, 4])
    path = tmp_path / "step4" / "model.safetensors"
    tensors = load_file(path)
    name = "gpt_neox.layers.1.mlp.dense_h_to_4h.bias"
    tensors[name][3] = torch.inf
    if safe:
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        path.unlink()
        torch.save(tensors, tmp_path / "step4" / "pytorch_model.bin")
    good, bad = describe_checkpoints(FolderSource(tmp_path), audit=True).splitlines()[1:3]
    assert good.split()[-2] == "ok"
    assert bad.split()[-2] == "FAULT"
    assert f"Its tensor {name} holds NaN or infinite values" in describe_checkpoints(FolderSource(tmp_path), audit=True)


def test_the_audit_says_whose_tokenizer_serves_the_series(tmp_path: Path, make_series: Callable[..., Path]) -> None:
    make_series(tmp_path, steps=[0], tokenizer=True)
    make_series(tmp_path, steps=[4], tokenizer=False)
    last = describe_checkpoints(FolderSource(tmp_path), audit=True).splitlines()[-1]
    assert f"that of {tmp_path / 'step0'}; 1 of 2 LLM checkpoints have none of their own." in last
    shutil.rmtree(tmp_path / "step0")
    assert "has a tokenizer. Save one there" in describe_checkpoints(FolderSource(tmp_path), audit=True)


class Hub(BaseHTTPRequestHandler):
    """Answers what the audit asks of the Hub: the branches of a repository, and the files of one."""

    # branch -> content of its weights by file. main is the last one, and step2000 serves it as well; as Pythia's
    # branches do, some have only the older format, and then no file of theirs is one that would be loaded from main.
    shards: ClassVar = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    weights: ClassVar[dict[str, dict[str, str]]] = {
        "main": {"model.safetensors": "end", "pytorch_model.bin": "the same as .bin"},
        "step0": {"model.safetensors": "a", "pytorch_model.bin": "a as .bin"},
        "step1": {"pytorch_model.bin": "a as .bin"},
        "step1000": {"model.safetensors": "b"},
        "step2000": {"pytorch_model.bin": "the same as .bin"},
        "step2500": {"pytorch_model.bin.index.json": "{}", shards[0]: "c", shards[1]: "d"},
        "step2600": {"pytorch_model.bin.index.json": "{}", shards[0]: "c", shards[1]: "d"},
        "step2700": {},
        "step3000": {"model.safetensors": "end"},
        "fp32": {},
    }
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        if path == "/api/models/org/llm/refs":
            branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": "0" * 40} for name in self.weights]
            return self.answer({"branches": branches, "converts": [], "tags": []})
        branch = path.removeprefix("/api/models/org/llm/revision/")
        if branch not in self.weights:
            return self.answer({"error": "nothing here"}, 404, "RepoNotFound")
        files: list[dict[str, object]] = [{"rfilename": "config.json"}]
        for name, content in self.weights[branch].items():
            lfs = {"sha256": hashlib.sha256(content.encode()).hexdigest(), "size": 1, "pointerSize": 1}
            files.append({"rfilename": name, "size": 1, **({} if name.endswith(".json") else {"lfs": lfs})})
        files += [{"rfilename": "tokenizer.json"}] if branch == "step1000" else []
        return self.answer({"id": "org/llm", "sha": hashlib.sha1(branch.encode()).hexdigest(), "siblings": files})

    def answer(self, content: dict[str, object], status: int = 200, error: str = "") -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


def test_the_audit_of_a_hub_series_downloads_nothing_and_finds_the_final_weights_under_other_names(
    tmp_path: Path,
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
        "NO_PROXY": "127.0.0.1",
    }
    try:
        command = [sys.executable, "-m", "saetrack", "checkpoints", "org/llm", "--audit"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    finally:
        server.shutdown()
        server.server_close()
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    steps = ["0", "1", "1000", "2000", "2500", "2600", "2700", "3000"]
    assert [line.split()[0] for line in lines[1:9]] == steps
    found = dict(zip(steps, [line.split("  ")[-1].strip() for line in lines[1:9]], strict=True))
    assert found == {
        "0": "-",
        "1": "step 0",
        "1000": "-",
        "2000": "main",
        "2500": "-",
        "2600": "step 2500",
        "2700": "-",
        "3000": "-",
    }
    assert "step 2000 (org/llm@step2000) has the weights of main, the finished LLM" in done.stdout
    assert "step 2700 (org/llm@step2700) cannot be used. org/llm@step2700 has no weights" in done.stdout
    assert lines[-3].startswith("The tokenizer of the whole series is that of org/llm@step1000; 7 of 8")
    assert lines[-1] == "Left out, for their names say no step: main, fp32."
    assert not [path for path in Hub.asked if not path.startswith("/api/")], "files are under org/llm/resolve"
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_contradicts_the_place_in_the_series_is_found(tmp_path: Path, make_series: Callable[..., Path]) -> None:
    make_series(tmp_path, steps=[4, 8, 12], name="checkpoint-{}")
    states = {4: {"global_step": 4, "num_input_tokens_seen": 900}, 8: {"global_step": 80}, 12: {"global_step": 12}}
    states[12]["num_input_tokens_seen"] = 100
    for step, state in states.items():
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    rows = audit(FolderSource(tmp_path).checkpoints())
    assert [row.doubt is None for row in rows] == [True, False, False]
    renamed, fewer = problems(rows)
    assert "step 8 " in renamed
    assert "has a trainer_state.json of step 80, so it is not what its name says." in renamed
    assert "has seen 100 tokens, fewer than the 900 of the earlier step 4." in fewer
    assert all(row.fault is None for row in rows)
    backward = audit(FolderSource(tmp_path).checkpoints()[::-1])
    assert {row.checkpoint: row.doubt for row in backward} == {row.checkpoint: row.doubt for row in rows}


def test_names_that_say_no_step_are_listed(tmp_path: Path, make_series: Callable[..., Path]) -> None:
    make_series(tmp_path, steps=[4])
    make_series(tmp_path, steps=[1, 2], name="final-{}")
    for name in ("tokenizer", ".cache"):
        (tmp_path / name).mkdir()  # no models
    for audited in (False, True):
        said = describe_checkpoints(FolderSource(tmp_path), audit=audited).splitlines()
        assert said[-1] == "Left out, for their names say no step: final-1, final-2."


def test_a_revision_that_is_nowhere_is_a_fault(tmp_path: Path) -> None:
    (row,) = audit([LLMCheckpoint("no/where", "step1", 1, tokens=2_097_152, cache_dir=str(tmp_path))])
    assert row.fault is not None
    assert "`hf download no/where --revision step1`" in row.fault
    assert "2,097,152" in format_audit([row])
