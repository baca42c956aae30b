"""The pictures of docs/report.md, taken of a quickstart's report.

python tests/browser/pictures.py runs/quickstart/gpt_neox.layers.2/report.html docs
"""

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright


def main() -> None:
    """Take the three pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--feature", type=int, default=1354)
    parser.add_argument("--step", type=int, default=64)
    parser.add_argument("--token", default="import")
    options = parser.parse_args()
    address = options.page.resolve().as_uri()
    shots = {
        "report-overview.png": ("#overview", "light", 1180),
        "report-features.png": ("#features", "light", 560),
        "report-feature.png": (f"#feature={options.feature}&step={options.step}", "dark", 1180),
    }
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, (view, scheme, height) in shots.items():
            page = browser.new_page(viewport={"width": 1280, "height": height}, color_scheme=scheme)
            page.goto(address + view)
            page.wait_for_selector("body[data-ready]")
            if view == "#features":
                page.fill("#search", options.token)
            page.wait_for_timeout(500)
            picture = Image.open(io.BytesIO(page.screenshot()))
            picture.convert("RGB").quantize(192).save(options.folder / name, optimize=True)  # a third of the bytes
        browser.close()


if __name__ == "__main__":
    main()
