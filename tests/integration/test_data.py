"""Every kind of corpus and every setting of rows, as a user writes them into the configuration."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saetrack import Track
from tests.conftest import build_tokenizer

Config = dict[str, Any]

STOP = """
from lightning import Callback

class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        if trainer.global_step == self.step:
            raise ValueError("stopped by the test")
"""


@pytest.fixture
def rows(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The documents of the run's text, two in a row, as tokens: parquet, and the same saved to disk."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    tokenizer, folder = build_tokenizer(), Path(text).parent
    ids = [tokenizer(path.read_text())["input_ids"] for path in sorted(folder.glob("*.txt"))]
    pairs = list(zip(ids[::2], ids[1::2], strict=True))
    table = pa.table(
        {
            "input_ids": [[*a, *b, 0] for a, b in pairs],
            "mask": [[1] * (len(a) + len(b)) + [0] for a, b in pairs],
            "docs": [[0] * len(a) + [1] * len(b) + [1] for a, b in pairs],
        }
    )
    pq.write_table(table, tmp_path / "ids.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    return tmp_path


def tokens_in(folder: Path, streaming: bool) -> Config:
    columns = {"attention_mask": "mask", "doc_ids": "docs"}
    if streaming:
        where: Config = {"path": "parquet", "data_files": [str(folder / "ids.parquet")], "streaming": True}
    else:
        where = {"path": str(folder / "saved")}
    return {"class_path": "DatasetCorpus", "init_args": {**where, "tokens": columns}}


def contents(run: Path) -> dict[str, str]:
    files = [path for path in run.glob("gpt_neox*/**/*") if path.is_file()]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_a_streamed_run_that_leaves_much_out_goes_on_after_a_stop(
    config: Config, rows: Path, fit_here: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stop_at.py").write_text(STOP)
    monkeypatch.syspath_prepend(tmp_path)
    config["data"]["corpus"] = tokens_in(rows, streaming=True)
    config["data"]["tokens"] |= {"max_tokens": 40_000, "layout": "masked", "outlier_norm": 1.3}
    config["scheduler"] |= {"steps": [0, 10], "tokens_first": 4_000}
    config["scheduler"]["warm_start"] = "transported"
    whole = fit_here(config)
    assert whole.returncode == 0, whole.stderr
    track = Track.open(tmp_path / "run")
    assert all(snapshot.metadata["left_out"]["outlier_norm"] > 0 for snapshot in track)
    config["scheduler"]["track_dir"] = str(tmp_path / "stopped")
    for step in (14, 40):  # in the middle of the two stages, after a resume file
        stop = {"class_path": "stop_at.StopAt", "init_args": {"step": step}}
        stopping = {**config, "trainer": {**config["trainer"], "callbacks": [stop]}}
        with pytest.raises(ValueError, match="stopped by the test"):
            fit_here(stopping, "--ckpt_path", "last")
    assert fit_here(config, "--ckpt_path", "last").returncode == 0
    assert contents(tmp_path / "stopped") == contents(tmp_path / "run")


@pytest.mark.slow
def test_separate_rows_and_saved_tokens_train_and_are_recorded(
    config: Config, rows: Path, fit_here: Callable[..., Any], tmp_path: Path
) -> None:
    config["data"]["corpus"] = tokens_in(rows, streaming=False)
    config["data"]["tokens"] |= {"layout": "separate", "bos": "never"}
    config["scheduler"] |= {"steps": [10], "tokens_first": 1_000}
    done = fit_here(config)
    assert done.returncode == 0, done.stderr
    track = Track.open(tmp_path / "run")
    assert track.facts["layout"] == "separate"
    assert track.facts["bos_token_id"] is None
    left_out = track[0].metadata["left_out"]
    assert left_out["bos"] == 0
    assert left_out["padding"] > 0.01
    evaluation = track.tokens("evaluation")
    assert track[0].metadata["evaluation_tokens"] == evaluation.usable().sum() < evaluation.tokens.size
    again = fit_here(config)
    assert again.returncode == 0
    assert "is complete" in again.stdout


@pytest.mark.parametrize(
    ("corpus", "tokens", "parts"),
    [
        ({"class_path": "JsonLinesCorpus", "init_args": {"paths": ["{}/bad.jsonl"]}}, {}, ["bad.jsonl, line 2 is no"]),
        (
            {"class_path": "JsonLinesCorpus", "init_args": {"paths": ["{}/ids.jsonl"], "tokens": {}}},
            {},
            ["ids.jsonl, line 2", "token id 64", "vocabulary has 64 ids"],
        ),
        (
            {"class_path": "ParquetCorpus", "init_args": {"paths": ["{}/ids.parquet"]}},
            {},
            ["ids.parquet has no column 'text'; it has ['docs', 'input_ids', 'mask']"],
        ),
        (
            {"class_path": "ParquetCorpus", "init_args": {"paths": ["{}/ids.parquet"], "tokens": {}}},
            {"max_tokens": 3_000},
            ["The corpus is too short: 3000 tokens were found", "no whole row of 32 tokens for evaluation"],
        ),
        (
            {"class_path": "DatasetCorpus", "init_args": {"path": "{}/nothing"}},
            {},
            ["corpus.path '", "nothing' cannot be read as a data set"],
        ),
        (
            {"class_path": "DatasetCorpus", "init_args": {"path": "some/text", "streaming": True}},
            {},
            ["data.tokens.max_tokens"],
        ),
        (
            {
                "class_path": "ParquetCorpus",
                "init_args": {"paths": ["{}/ids.parquet"], "tokens": {"across_rows": True}},
            },
            {},
            ["across_rows is true"],
        ),
        (None, {"layout": "heap"}, ["packed", "masked", "separate"]),
        (None, {"bos": "perhaps"}, ["always", "tokenizer", "never"]),
        (None, {"outlier_norm": 0.5}, ["data.tokens.outlier_norm is 0.5"]),
        (None, {"max_tokens": 10_000}, ["data.tokens.selection_tokens asks for 2,000 tokens"]),
    ],
)
def test_what_is_wrong_with_the_data_is_said_in_one_line(
    config: Config,
    rows: Path,
    fit_here: Callable[..., Any],
    corpus: Config | None,
    tokens: Config,
    parts: list[str],
) -> None:
    (rows / "bad.jsonl").write_text('{"text": "a"}\n{"text": a}\n')
    (rows / "ids.jsonl").write_text("".join(json.dumps({"input_ids": [5, n]}) + "\n" for n in (63, 64)))
    if corpus is not None:
        config["data"]["corpus"] = json.loads(json.dumps(corpus).replace("{}/", f"{rows}/"))
    config["data"]["tokens"] |= tokens
    done = fit_here(config)
    assert done.returncode in (1, 2)
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1, lines
    assert all(part in lines[0] for part in parts), lines[0]
