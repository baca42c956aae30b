"""How fast a report opens and answers a filter, in headless Chromium.

saetrack report runs/quickstart
python benchmarks/report.py runs/quickstart/gpt_neox.layers.2/report.html
"""

import argparse
import shutil
import statistics
from pathlib import Path

from measuring import report
from playwright.sync_api import sync_playwright

FILTER = """(text) => {
  const field = document.getElementById("search");
  field.value = text;
  const begin = performance.now();
  field.dispatchEvent(new Event("input"));
  document.querySelector(".scroll").getBoundingClientRect();  // the layout is part of the answer
  return performance.now() - begin;
}"""


def main() -> None:
    """Open the page again and again, then filter it by tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        opened = []
        for _ in range(options.rounds):
            page = browser.new_page()
            page.goto(options.page.resolve().as_uri())
            page.wait_for_selector("body[data-ready]", timeout=60_000)
            opened.append(page.evaluate("performance.now()") / 1e3)
            page.close()
        page = browser.new_page()
        page.goto(options.page.resolve().as_uri() + "#features")
        page.wait_for_selector("#search")
        answers = [
            page.evaluate(FILTER, text) for text in ["e", "the", "import", "x", "", "no such token"] * options.rounds
        ]
        browser.close()
    facts = {"megabytes": round(options.page.stat().st_size / 1e6, 2), "rounds": options.rounds, "at_most": True}
    report("report", "seconds to open", value=round(statistics.median(opened), 3), bar=2.0, **facts)
    report("report", "milliseconds to filter, slowest", value=round(max(answers), 1), bar=100.0, **facts)


if __name__ == "__main__":
    main()
