"""The pictures of docs/report.md and docs/figures.md, taken of a quickstart's track and its report.

saetrack analyze runs/quickstart --analyses+=Dictionaries
saetrack report runs/quickstart
python tests/browser/pictures.py runs/quickstart/gpt_neox.layers.2 docs
"""

import argparse
import io
import shutil
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

FIGURES = {
    1.5: "drift/adjacent drift/identity drift/to_last formation/formed formation/progress semantics/examples "
    "semantics/semantics",
    1.0: "drift/controls formation/map identity/correlation identity/survival",
}
"""What the analyses drew, by how much larger it is shown."""


def main() -> None:
    """Take them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("track", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--feature", type=int, default=1178)
    parser.add_argument("--step", type=int, default=64)
    parser.add_argument("--token", default="import")
    options = parser.parse_args()
    track = options.track.resolve()
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        of_the_report(browser, (track / "report.html").as_uri(), options)
        of_the_analyses(browser, track, options.folder / "figures")
        browser.close()


def opened(browser: Browser, address: str, size: tuple[int, int], scheme: Any) -> Page:
    """A view of the report, when it is there."""
    width, height = size
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.goto(address)
    page.wait_for_selector("body[data-ready]")
    return page


def of_the_report(browser: Browser, address: str, options: argparse.Namespace) -> None:
    """Its three views, and the panel of phases."""
    shots = {
        "report-overview.png": ("#overview", "light", 1180),
        "report-features.png": ("#features", "light", 560),
        "report-feature.png": (f"#feature={options.feature}&step={options.step}", "dark", 1180),
    }
    for name, (view, scheme, height) in shots.items():
        page = opened(browser, address + view, (1280, height), scheme)
        if view == "#features":
            page.fill("#search", options.token)
        page.wait_for_timeout(500)
        save(page.screenshot(), options.folder / name, colours=192)
    page = opened(browser, f"{address}#overview&section=phases", (1000, 900), "light")
    page.wait_for_timeout(500)
    save(page.locator("#phases-boundaries").screenshot(), options.folder / "figures" / "phases-report.png")


def of_the_analyses(browser: Browser, track: Path, folder: Path) -> None:
    """The figures that lie in the track."""
    for scale, names in FIGURES.items():
        page = browser.new_page(viewport={"width": 1600, "height": 1600}, device_scale_factor=scale)
        for name in names.split():
            page.goto((track / "analyses" / f"{name}.svg").as_uri())
            save(page.locator("svg").first.screenshot(), folder / f"{name.replace('/', '-')}.png")


def save(shot: bytes, path: Path, colours: int = 64) -> None:
    """Write it with few colours, a third of the bytes."""
    Image.open(io.BytesIO(shot)).convert("RGB").quantize(colours).save(path, optimize=True)


if __name__ == "__main__":
    main()
