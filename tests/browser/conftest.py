"""Reports in headless Chromium. Debian's is used, so no browser is downloaded: ``apt-get install chromium``."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from playwright.sync_api import Browser, Page, sync_playwright
from safetensors.numpy import load_file, save_file

from saetrack.report import write_report
from saetrack.track import Track
from tests.unit.report.conftest import analysed

__all__ = ["analysed"]  # a fixture of the unit tests, used here too

CHROMIUM = shutil.which("chromium")
NASTY = "</script><img onerror=\"document.title='broken'\" src=x>"
"""A token that would run if it were ever taken for markup."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("browser")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def spoil(track: Path) -> None:
    """Put the nasty token into the corpus, the logit effect and the model's name."""
    facts = json.loads((track / "track.json").read_text())
    source = Path(facts["tokenizer"][0])
    tokenizer = shutil.copytree(source, track / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    for path in tokenizer.glob("token*.json"):
        path.write_text(path.read_text().replace(json.dumps("<|unk|>"), json.dumps(NASTY)))
    facts |= {"tokenizer": [str(tokenizer), None], "model": NASTY}
    (track / "track.json").write_text(json.dumps(facts))
    arrays = load_file(track / "tokens.safetensors")
    table = pd.read_parquet(track / "analyses" / "semantics" / "contexts.parquet")
    first = table[table["feature"] == 7].iloc[0]
    arrays["selection.tokens"][first["row"], first["column"]] = 1  # the id of <|unk|>
    save_file(arrays, track / "tokens.safetensors")
    logits = pd.read_parquet(track / "analyses" / "profile" / "logits.parquet")
    logits["raised"] = [np.array([NASTY, *found[1:]], dtype=object) for found in logits["raised"]]
    logits.to_parquet(track / "analyses" / "profile" / "logits.parquet")


@pytest.fixture(scope="session")
def report(analysed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file, with the nasty token in it, and a made-up formation so that there is something to sort by."""
    track = Path(shutil.copytree(analysed, tmp_path_factory.mktemp("browser") / "track"))
    spoil(track)
    folder = track / "analyses" / "formation"
    folder.mkdir()
    steps = np.array([10.0, 4.0, 1.0, np.nan])[np.arange(64) % 4]
    formed = pd.DataFrame({"feature": np.arange(64), "formed_step": steps})
    formed.to_parquet(folder / "features.parquet")
    return write_report([Track.open(track)], track / "report.html").path


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a page of a report; on leaving it holds that there was no error and no request beyond the disk."""
    wrong: list[str] = []
    contexts = []

    def open_page(path: Path, address: str = "", **options: object) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or wrong.append(request.url)
        )
        page.goto(path.as_uri() + address)
        page.wait_for_selector("body[data-ready]", timeout=20_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []
