"""How fast a report opens and answers, in headless Chromium: a filter, a sorting, a feature, a move of the slider.

saetrack report runs/quickstart
python benchmarks/report_track.py runs/report-bench --checkpoints 30 --features 4096
saetrack report runs/report-bench/track
python benchmarks/report.py runs/quickstart/gpt_neox.layers.2/report.html runs/report-bench/track/report.html
"""

import argparse
import shutil
import statistics
from pathlib import Path

from measuring import report
from playwright.sync_api import Browser, Page, sync_playwright

FILTER = """(text) => {
  const field = document.getElementById("search");
  field.value = text;
  const begin = performance.now();
  field.dispatchEvent(new Event("input"));
  document.querySelector(".scroll").getBoundingClientRect();  // the layout is part of the answer
  return performance.now() - begin;
}"""

SORT = """(place) => {
  const begin = performance.now();
  document.querySelectorAll(".features th button")[place].click();
  document.querySelector(".scroll").getBoundingClientRect();
  return performance.now() - begin;
}"""

FEATURE = """async (feature) => {
  const begin = performance.now();
  location.hash = `feature=${feature}`;
  const title = () => document.querySelector("h1")?.textContent;
  const there = () => title() === `Feature ${feature}` && document.querySelector("#moving-curves svg");
  while (!there()) await new Promise(requestAnimationFrame);
  return performance.now() - begin;
}"""

SLIDE = """async (place) => {
  const slider = document.getElementById("slider");
  slider.value = place;
  const begin = performance.now();
  slider.dispatchEvent(new Event("input"));
  while (!document.querySelector("#moving-curves svg")) await new Promise(requestAnimationFrame);
  return performance.now() - begin;
}"""

WORDS = ("e", "the", "import", "x", "", "no such token")


def main() -> None:
    """Open each page again and again, then use it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for path in options.pages:
            measure(browser, path.resolve(), options.rounds)
        browser.close()


def measure(browser: Browser, path: Path, rounds: int) -> None:
    """Print the figures of one page."""
    opened = []
    for _ in range(rounds):
        page = opening(browser, path, "#overview")
        opened.append(page.evaluate("performance.now()") / 1e3)
        page.close()
    page = opening(browser, path, "#features")
    filtered = [page.evaluate(FILTER, text) for text in WORDS * rounds]
    page.evaluate(FILTER, "")
    columns = page.locator(".features th button").count()
    sorted_by = [page.evaluate(SORT, place) for place in range(columns) for _ in range(2)]
    features = page.locator(".features tbody tr[data-feature]").count()
    shown = [page.evaluate(FEATURE, feature) for feature in range(0, 128 * rounds, 128)]
    last = int(page.locator("#slider").get_attribute("max") or 0)
    slid = [page.evaluate(SLIDE, place) for place in range(last)]
    page.close()
    facts = {"page": f"{path.parent.parent.name}/{path.parent.name}", "megabytes": round(path.stat().st_size / 1e6, 2)}
    facts |= {"rounds": rounds, "rows_drawn": features}
    report("report", "seconds to open", value=round(statistics.median(opened), 3), bar=2.0, at_most=True, **facts)
    report("report", "milliseconds to filter, slowest", value=round(max(filtered), 1), bar=100.0, at_most=True, **facts)
    report("report", "milliseconds to filter", value=round(statistics.median(filtered), 1), **facts)
    report("report", "milliseconds to sort, slowest", value=round(max(sorted_by), 1), **facts)
    report("report", "milliseconds to open a feature", value=round(statistics.median(shown), 1), **facts)
    report("report", "milliseconds to move the slider", value=round(statistics.median(slid), 1), **facts)


def opening(browser: Browser, path: Path, view: str) -> Page:
    """A new page that is ready."""
    page = browser.new_page()
    page.goto(path.as_uri() + view)
    page.wait_for_selector("body[data-ready]", timeout=60_000)
    return page


if __name__ == "__main__":
    main()
