import json
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from saetrack.lm import pretrain_module
from saetrack.lm.corpus import TextCorpus
from saetrack.lm.pretrain import PretrainConfig, pretrain, train_tokenizer
from saetrack.lm.pretrain_config import learning_rate_factor, rows_of_step
from saetrack.lm.pretrain_module import PretrainModule, SeriesWriter, TokenBatches
from saetrack.lm.tokens import TokenRows
from tests.trees import hashes

# lightning/pytorch/utilities/_pytree.py:21 with torch 2.13
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")

STEPS = [0, 1, 2, 4, 8, 12]
WORDS = ["the", "cat", "and", "a", "dog", "sat", "on", "one", "old", "mat", "while", "it", "rained"]


@pytest.fixture
def text(tmp_path: Path) -> TextCorpus:
    rng = np.random.default_rng(0)
    documents = [" ".join(rng.choice(WORDS, size=20)) for _ in range(300)]
    (tmp_path / "text.txt").write_text("|".join(documents))
    return TextCorpus([str(tmp_path / "text.txt")], separator="|")


def config(text: TextCorpus, **options: Any) -> PretrainConfig:
    tiny = {"n_layers": 1, "d_model": 16, "n_heads": 2, "vocab_size": 300, "context_size": 16, "batch_size": 4}
    return PretrainConfig(**(tiny | {"steps": 12, "warmup_steps": 2, "learning_rate": 0.02, "corpus": text} | options))


def train(folder: Path, configuration: PretrainConfig) -> None:
    pretrain(folder, configuration, accelerator="cpu")


def test_a_series_is_written_as_hugging_face_folders(tmp_path: Path, text: TextCorpus) -> None:
    train(tmp_path / "llm", config(text))
    names = {path.name for path in (tmp_path / "llm").iterdir()}
    assert names == {f"step{step}" for step in STEPS} | {"pretrain.json", "tokenizer", "tokens", "done"}
    batch = None
    losses = {}
    for step in STEPS:
        folder = tmp_path / "llm" / f"step{step}"
        state = json.loads((folder / "trainer_state.json").read_text())
        assert state == {"global_step": step, "num_input_tokens_seen": step * 4 * 16}
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
        if batch is None:
            batch = torch.tensor([tokenizer("the cat and a dog sat on one old mat").input_ids])
        llm = AutoModelForCausalLM.from_pretrained(folder)
        assert llm.dtype == torch.float32
        losses[step] = llm(batch, labels=batch).loss.item()
    assert losses[0] == pytest.approx(np.log(300), rel=0.05)
    assert losses[12] < losses[0] - 0.5


def test_a_log_file_gets_whole_lines_with_loss_speed_and_the_time_left(
    tmp_path: Path, text: TextCorpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("saetrack.lm.pretrain.LossBar", lambda: pretrain_module.LossBar(every_seconds=0))
    train(tmp_path / "llm", config(text))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Pretraining the LLM: ")]
    assert said[0] == "Pretraining the LLM: 12 steps"
    for step, line in enumerate(said[1:], start=1):
        assert re.fullmatch(
            rf"Pretraining the LLM: step {step} of 12, loss \d\.\d{{3}} nats, [\d,]+ tokens/s, \d+ s left", line
        ), line
    assert len(said) == 13


@pytest.mark.parametrize("stop", [1, 3, 4, 7, 11], ids=lambda n: f"stopped at step {n}")
def test_an_interrupted_series_ends_as_an_uninterrupted_one(
    tmp_path: Path, text: TextCorpus, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    monkeypatch.setattr(pretrain_module, "_RESUME_EVERY", 3)
    train(tmp_path / "whole", config(text))
    write = SeriesWriter.on_train_batch_end

    def stopped(self: SeriesWriter, trainer: pl.Trainer, *arguments: Any) -> None:
        write(self, trainer, *arguments)
        if trainer.global_step == stop:
            raise OSError("the plug was pulled")

    monkeypatch.setattr(SeriesWriter, "on_train_batch_end", stopped)
    with pytest.raises(OSError, match="plug"):
        train(tmp_path / "parts", config(text))
    monkeypatch.setattr(SeriesWriter, "on_train_batch_end", write)
    seen: list[int] = []
    step = PretrainModule.training_step
    monkeypatch.setattr(
        PretrainModule, "training_step", lambda self, b, i: (seen.append(self.global_step), step(self, b, i))[1]
    )
    train(tmp_path / "parts", config(text))
    assert seen == list(range(stop // 3 * 3, 12))
    assert hashes(tmp_path / "parts", "step*/*") == hashes(tmp_path / "whole", "step*/*")


def test_the_resume_file_holds_only_plain_values(
    tmp_path: Path, text: TextCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain_module, "_RESUME_EVERY", 5)
    train(tmp_path / "llm", config(text))
    assert torch.load(tmp_path / "llm/resume/last.ckpt", weights_only=True)["global_step"] == 10


def test_a_finished_series_is_left_alone(tmp_path: Path, text: TextCorpus, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "llm"
    train(folder, config(text, steps=2))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    (tmp_path / "text.txt").unlink()
    with caplog.at_level("INFO", logger="saetrack"):
        train(folder, config(text, steps=2))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert "nothing to do" in caplog.text
    with pytest.raises(ValueError, match=r"learning_rate is 1.0 but was 0.02"):
        train(folder, config(text, steps=2, learning_rate=1.0))


def test_an_unfinished_series_refuses_another_configuration_or_text(tmp_path: Path, text: TextCorpus) -> None:
    folder = tmp_path / "llm"
    folder.mkdir()
    (folder / "pretrain.json").write_text(json.dumps(config(text).facts))
    with pytest.raises(ValueError, match=r"seed is 1 but was 0\. Give the old values"):
        train(folder, config(text, seed=1))
    (tmp_path / "text.txt").write_text("other text")
    with pytest.raises(ValueError, match=r"corpus is .* but was"):
        train(folder, config(TextCorpus(text.paths, text.separator)))


def test_foreign_checkpoints_are_not_mixed_with(tmp_path: Path, text: TextCorpus) -> None:
    (tmp_path / "llm" / "step5").mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"step5, but no pretrain\.json"):
        train(tmp_path / "llm", config(text))


def test_a_loss_that_is_not_finite_stops_the_series(tmp_path: Path, text: TextCorpus) -> None:
    with pytest.raises(RuntimeError, match=r"loss of step \d+ is nan.*learning_rate below 1e\+30"):
        train(tmp_path / "llm", config(text, learning_rate=1e30))
    assert not (tmp_path / "llm" / "step12").exists()


def test_the_tokenizer_is_a_byte_level_bpe_that_is_the_same_every_time(text: TextCorpus) -> None:
    first, second = train_tokenizer(text, 280), train_tokenizer(text, 280)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) == 280
    assert first.decode(first("a naïve 猫\n\tcat").input_ids) == "a naïve 猫\n\tcat"


def test_checkpoints_double_up_to_512_and_then_follow_every(text: TextCorpus) -> None:
    doubled = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert PretrainConfig(steps=600).checkpoint_steps == [*doubled, 600]
    assert PretrainConfig(steps=2100, every=500).checkpoint_steps == [*doubled, 1000, 1500, 2000, 2100]
    assert PretrainConfig(steps=2000, every=500).checkpoint_steps == [*doubled, 1000, 1500, 2000]
    assert PretrainConfig(steps=5, every=1).checkpoint_steps == [0, 1, 2, 4, 5]
    assert PretrainConfig(steps=514, every=1).checkpoint_steps == [*doubled, 513, 514]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"d_model": 10, "n_heads": 4}, "d_model 10 must be a multiple of n_heads 4"),
        ({"vocab_size": 256}, "vocab_size is 256"),
        ({"decay_share": 1.5}, "decay_share is 1.5"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainConfig(**options)


@pytest.mark.parametrize(("warmup", "decay"), [(10, 0.2), (0, 0.0), (0, 1.0), (100, 0.5)])
def test_the_learning_rate_warms_up_stays_and_decays(warmup: int, decay: float) -> None:
    shape = PretrainConfig(steps=100, warmup_steps=warmup, decay_share=decay)
    factors = np.array([learning_rate_factor(step, shape) for step in range(100)])
    rising, falling = (np.arange(100) + 1) / max(warmup, 1), (100 - np.arange(100)) / max(100 * decay, 1)
    np.testing.assert_allclose(factors, np.minimum(1, np.minimum(rising, falling)))
    assert factors.min() > 0


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    tokens = np.arange(1000, dtype=np.uint16).reshape(250, 4)
    rows = TokenRows(tokens, np.zeros_like(tokens, dtype=np.int32), None)
    shape = PretrainConfig(steps=5, batch_size=3, context_size=4)
    batches = list(TokenBatches(rows, shape))
    assert len(batches) == 5
    assert all(batch.dtype == torch.int64 and batch.shape == (3, 4) for batch in batches)
    late = TokenBatches(rows, shape)
    late.load_state_dict({"position": 3})
    assert all(torch.equal(a, b) for a, b in zip(late, batches[3:], strict=True))
    assert len({tuple(rows_of_step(s, 250, PretrainConfig(seed=seed))) for s in (0, 1) for seed in (0, 1)}) == 4


def test_the_loss_is_the_models_own(text: TextCorpus) -> None:
    module = PretrainModule(config(text, batch_size=9))
    batch: Tensor = torch.randint(300, (9, 16), generator=torch.Generator().manual_seed(0))
    expected = module.llm(batch, labels=batch).loss
    torch.testing.assert_close(module.training_step(batch, 0), expected)


def test_initial_weights_depend_on_the_seed_alone(text: TextCorpus) -> None:
    def weights(seed: int) -> Tensor:
        return PretrainModule(config(text, seed=seed)).llm.get_output_embeddings().weight

    state = torch.get_rng_state()
    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
    assert torch.equal(torch.get_rng_state(), state)
