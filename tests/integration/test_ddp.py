"""Two processes give one track: the same tokens, the same files on a repeat, the same quality as one process."""

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saetrack import Track

TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


def hashes(folder: Path) -> dict[str, str]:
    files = [p for p in folder.glob("gpt_neox*/**/*") if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_two_processes(
    config: dict[str, Any], run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    config["scheduler"] |= {"steps": [0, 10], "tokens_first": 12_000, "tokens_next": 8_000}
    config["model"]["optimizer"]["lr"] = 5.0e-3
    tracks = []
    for name, options in (("one", ()), ("two", TWO), ("again", TWO)):
        config["scheduler"]["track_dir"] = str(tmp_path / name)
        done = run(config, *options)
        assert done.returncode == 0, done.stderr
        tracks.append(Track.open(tmp_path / name))
    one, two, _ = tracks
    assert hashes(tmp_path / "two") == hashes(tmp_path / "again")
    assert set(hashes(tmp_path / "one")) == set(hashes(tmp_path / "two"))
    for a, b in zip(one, two, strict=True):
        assert a.metadata["tokens_trained"] == b.metadata["tokens_trained"]
        assert a.metadata["evaluation_tokens"] == b.metadata["evaluation_tokens"]
        assert a.metadata["ce_clean"] == pytest.approx(b.metadata["ce_clean"], rel=1e-6)
        assert b.metadata["fvu"] == pytest.approx(a.metadata["fvu"], rel=0.05)
        assert b.metadata["fvu"] != a.metadata["fvu"]  # the ranks read rows of their own
