"""The site: every page is in its navigation, links lead somewhere, the API is whole, nothing comes from elsewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

import saetrack

from .pages import ROOT

DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def pages_in(nav: object) -> list[str]:
    """The files that a navigation names, at any depth."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in pages_in(part)]  # type: ignore[attr-defined]


def test_every_page_is_in_the_navigation_once() -> None:
    # of a notebook docs/hooks.py makes a page
    written = [p.relative_to(DOCS).with_suffix(".md") for p in DOCS.rglob("*") if p.suffix in (".md", ".ipynb")]
    assert sorted(pages_in(CONFIG["nav"])) == sorted(path.as_posix() for path in written)


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_links_and_images_of_a_page_are_there(page: Path) -> None:
    tokens = MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))
    children = [child for token in tokens for child in token.children or []]
    targets = [str(c.attrGet("href") or c.attrGet("src")) for c in children if c.type in ("link_open", "image")]
    local = [target for target in targets if not re.match(r"https?:", target)]
    missing = [t for t in local if t.partition("#")[0] and not (page.parent / t.partition("#")[0]).is_file()]
    assert missing == []
    images = [str(c.attrGet("src")) for c in children if c.type == "image"]
    assert [image for image in images if re.match(r"https?:", image)] == [], "an image from elsewhere is a request"


def test_the_api_page_has_every_public_name() -> None:
    shown = set(re.findall(r"^::: [\w.]+\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    assert shown == set(saetrack.__all__) - {"__version__"}


def test_the_site_builds_without_a_warning_and_asks_nobody_else(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=\"?(https?://[^\"> ]+)", page.read_text())
        assert loaded == [], f"{page.name} loads {loaded}"
