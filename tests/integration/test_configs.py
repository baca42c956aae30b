"""Every shipped configuration is one that `saetrack fit` understands, and says how to run it."""

from pathlib import Path

import pytest

from saetrack.cli import main

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_parses(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["saetrack"])  # LightningCLI warns when it is given arguments and finds others here
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(path), "--print_config"])
    assert stopped.value.code == 0
    assert f"track_dir: runs/{path.stem}" in capsys.readouterr().out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_begins_with_the_command_that_runs_it(path: Path) -> None:
    assert path.read_text().splitlines()[0] == f"# saetrack fit --config configs/{path.name}"
