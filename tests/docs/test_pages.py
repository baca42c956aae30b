"""Every command and every block of code that a reader may copy, from README.md, docs/ and the plugins' READMEs."""

import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from saetrack.cli import main

from .commands import complaint, options
from .pages import PAGES, ROOT, Block, blocks, inline_code

BLOCKS = [block for page in PAGES for block in blocks(page)]
NOT_RUN = {
    r"^saetrack fit": "takes minutes and more, some need the Hub and a GPU; parsed, and run small by conftest.py",
    r"^saetrack control": "takes minutes; parsed here, run by tests/integration/test_control.py and by conftest.py",
    r"^saetrack pretrain": "takes minutes; parsed here, run by tests/integration/test_commands.py",
    r"^saetrack checkpoints EleutherAI/": "needs the Hub; parsed",
    r"^saetrack (export|import) .*(--push|hf://|downloads/)": "needs the Hub, or files from elsewhere; parsed",
    r"UMAPTrajectories": "needs the plugin installed; parsed, run by tests/unit/analysis/test_shipped_plugins.py",
    r"^(srun|torchrun) ": "needs a cluster; what it starts is parsed",
    r"^tensorboard ": "does not end",
    r"^pip ": "installs; the extra and the folder that it names are looked up",
    r"^make ": "the target is looked up in the Makefile",
    r"^(HF_HUB_OFFLINE=1|hf) ": "the Hub's own command, or an environment for one of ours, which is parsed",
}
"""Commands that no test runs, and why. A command is run unless one of these says otherwise."""

# what stands for something that a reader fills in
PLACEHOLDERS = {"TEXT": "all", "SOURCE": "folder", "CLASS": "TopKSAE"}


def commands(page_blocks: list[Block]) -> list[tuple[Block, list[str]]]:
    return [(block, words) for block in page_blocks if block.language == "bash" for words in block.commands]


COMMANDS = commands(BLOCKS)


def reason_not_to_run(words: list[str]) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, " ".join(words))), None)


def ours(words: list[str]) -> list[str] | None:
    """The part of a command that saetrack reads, whatever starts it; None if nothing of it is."""
    return words[words.index("saetrack") + 1 :] if "saetrack" in words and words[0] != "pip" else None


@pytest.mark.parametrize(("block", "words"), COMMANDS, ids=[f"{b} {' '.join(w)[:50]}" for b, w in COMMANDS])
def test_saetrack_understands_the_command(
    block: Block, words: list[str], monkeypatch: pytest.MonkeyPatch, finished_run: Path
) -> None:
    monkeypatch.chdir(finished_run)
    mine = ours(words)
    if mine is not None:
        saved = [b for b in blocks(block.page) if b.title]
        if any(Path(b.title or "").stem in " ".join(words) for b in saved):
            return  # names a file of the page itself; test_the_code_of_a_page_runs writes it and runs the command
        monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "plugins"), str(ROOT / "plugins/saetrack-umap/src")])
        if "UMAPTrajectories" in " ".join(words):
            import_module("saetrack_umap")  # installed, its entry point would
        wrong = complaint(mine)
        assert wrong is None, f"{block}: {wrong}"
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), f"{block}: the Makefile has {targets}"
    elif words[0] == "pip":
        for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
            assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(), f"{block}: there is no extra {extra}"
        assert all((ROOT / word).is_dir() for word in words if word.startswith("./")), f"{block}: no such folder"
    else:
        assert reason_not_to_run(words), f"{block}: nothing knows what {' '.join(words)!r} is; add it to NOT_RUN"


def test_every_reason_not_to_run_is_needed() -> None:
    needed = {reason_not_to_run(words) for _, words in COMMANDS}
    assert [pattern for pattern, why in NOT_RUN.items() if why not in needed] == []


ran: list[list[str]] = []
"""What an earlier page has run already; no page reads the results of a command that another shows too."""
PAGES_WITH_CODE = [page for page in PAGES if any(b.language in ("python", "bash") for b in blocks(page))]


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs(page: Path, workspace: Path) -> None:
    """From top to bottom, as a reader copies it; files are saved where their title says."""
    names: dict[str, object] = {"__name__": "__page__"}
    for block in blocks(page):
        if block.title:
            (workspace / block.title).write_text(block.code)
        elif block.language == "python":
            exec(compile(block.code, str(block), "exec"), names)
        for _, words in commands([block]):
            mine = ours(words)
            if mine is not None and reason_not_to_run(words) is None and mine not in ran:
                main(mine)
                ran.append(mine)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=str)
def test_a_piece_of_configuration_is_understood(block: Block, tmp_path: Path) -> None:
    (tmp_path / "piece.yaml").write_text(block.code)
    config = ["--config", str(ROOT / "configs" / "quickstart.yaml"), "--config", str(tmp_path / "piece.yaml")]
    wrong = complaint(["fit", *config])
    assert wrong is None, f"{block}: {wrong}"
    assert yaml.safe_load(block.code), f"{block} is empty"


def test_a_block_says_what_it_is() -> None:
    known = {"python", "bash", "yaml", "text", "json"}
    assert [f"{b} is {b.language!r}" for b in BLOCKS if b.language not in known] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_and_keys_in_the_text_exist(page: Path) -> None:
    """Commands between backticks are parsed; of lone options and configuration keys the name is looked up."""
    wrong = [f"`{code}`: {said}" for code in inline_code(page) if (said := said_against(code)) is not None]
    assert wrong == []


def said_against(code: str) -> str | None:
    if code.startswith("saetrack ") and len(words := code.split()) > 2:
        filled = [PLACEHOLDERS.get(word, word.split("|")[0]) for word in words[1:]]
        return complaint(filled)
    key = re.match(r"(?:--)?(?!model\.layers\.)((?:scheduler|data|model|trainer|analyze|resume)\.[\w.]+)", code)
    option = re.match(r"--([\w.]+)", code)
    name = key[1] if key else option[1] if option else None
    if name is None or name in options():
        return None
    parent = next((o for o in options() if name.startswith(f"{o}.") and f"{o}.help" in options()), None)
    return None if parent is not None else "there is no such option"


def test_a_typing_mistake_is_found() -> None:
    quickstart = ["fit", "--config", str(ROOT / "configs" / "quickstart.yaml")]
    assert complaint(quickstart) is None
    mistakes = [
        [*quickstart, "--scheduler.warmstart", "prior"],
        [*quickstart, "--scheduler.steps", "log20"],
        [*quickstart, "--model.sae", "TopKSAE", "--model.sae.kk", "4"],
        ["analyze", "runs/quickstart", "--analyses+=Drft"],
        ["analyze", "runs/quickstart", "--analyses+=Drift", "--analyses.sede", "1"],
        ["control", "runs/quickstart", "--kind", "null", "--chains", "true"],
        ["control", "runs/quickstart", "--kind", "null", "--budget", "first"],
        ["export", "runs/quickstart", "--format", "saelen", "--to", "out"],
        ["checkpoints", "folder", "--select", "paper:pythia"],
        ["reports", "runs/quickstart"],
    ]
    assert [words for words in mistakes if complaint(words) is None] == []
    assert said_against("scheduler.max_rises") is not None
    assert said_against("--ckptpath last") is not None
    assert said_against("`--scheduler.max_rise 0.5`".strip("`")) is None


def test_the_plugin_in_the_readme_is_the_one_in_plugins() -> None:
    shipped = (ROOT / "plugins" / "firing_entropy.py").read_text()
    (shown,) = [b.code for b in blocks(ROOT / "README.md") if "class FiringEntropy" in b.code]
    assert shown == shipped
