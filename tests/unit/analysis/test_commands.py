"""``saetrack analyze`` and what is typed wrong: one line that names the command, and nothing is lost."""

import sys
from collections.abc import Callable

import pytest

from saetrack.cli import main
from saetrack.track import Track

Fails = Callable[..., str]


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["saetrack"])


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs a command that must fail, and returns the one line that it says."""

    def run(*words: str) -> str:
        with pytest.raises(SystemExit):
            main(list(words))
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


@pytest.mark.parametrize(
    ("analysis", "option", "value", "said"),
    [
        ("Identity", "threshold", "1.5", "saetrack: error: identity's threshold is 1.5"),
        ("Causal", "sample", "-3", "saetrack: error: causal's sample is -3"),
        ("Formation", "baseline", "foo", "saetrack: error: formation's baseline 'foo' is none"),
        ("Phases", "permutations", "0", "saetrack: error: phases needs at least 2 replicates and 20 permutations"),
        ("Identity", "threshold", "high", "saetrack analyze: error: threshold is high; expected float"),
        ("Identity", "nope", "3", "saetrack analyze: error: Option 'nope' is not accepted"),
    ],
)
def test_a_wrong_argument_of_an_analysis_is_one_line_of_its_own_command(
    analysis: str, option: str, value: str, said: str, tiny_track: Track, fails: Fails
) -> None:
    line = fails("analyze", str(tiny_track.path), f"--analyses+={analysis}", f"--analyses.{option}", value)
    assert line.startswith(said)
    assert "saetrack fit" not in line


def test_a_snapshot_without_its_table_of_features_is_named(tiny_track: Track, fails: Fails) -> None:
    lost = tiny_track[2].path / "features.parquet"
    lost.unlink()
    assert fails("report", str(tiny_track.path)).startswith(f"saetrack: error: {lost} is not there, and every snapshot")


def test_what_is_saved_is_said_though_another_analysis_refuses(
    tiny_track: Track, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["analyze", str(tiny_track.path), "--analyses+=Phases", "--analyses+=Quality"])
    said = capsys.readouterr()
    assert said.out.startswith("quality: 4 snapshots, LLM steps 0 to 10: FVU ")
    assert said.out.splitlines()[-1] == f"  {tiny_track.analyses_dir / 'quality'}"
    first, *_, last = said.err.splitlines()
    assert first == "Analysing gpt_neox.layers.0: 2 analyses and LLM checkpoints to do"
    assert last.startswith("saetrack: error: Analysis 'phases' failed: ")
    assert last.endswith("The results of 'quality' are saved.")
