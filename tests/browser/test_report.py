"""The report as a person uses it."""

import csv
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page

from saetrack.report import write_report
from saetrack.track import Track
from tests.unit.report.test_page import add_plugin, old_drift

from .conftest import NASTY

AXE = Path(__file__).parent / "vendor" / "axe.min.js"
VALIDATOR = Path(__file__).parent / "vendor" / "html-validate.min.js"
NOT_MARKUP = {"no-inline-style": "off", "attribute-boolean-style": "off", "long-title": "off"}
"""Rules of style: bars have their width inline, the DOM gives every boolean attribute a value, names may be long."""
Open = Callable[..., Page]


def shown(page: Page, column: int) -> list[str]:
    return page.locator(f"table.features tbody tr[data-feature] td:nth-child({column})").all_inner_texts()


def test_overview_draws_its_figures_and_follows_the_axis_switch(report: Path, open_page: Open) -> None:
    page = open_page(report)
    figure = page.locator("#quality-quality-fvu")
    left = "texts => texts.map((text) => text.getBoundingClientRect().x + text.getBoundingClientRect().width / 2)"
    gaps = {}
    for axis in ("log", "linear", "index"):
        page.select_option("#axis", axis)
        figure.locator("svg path").first.wait_for(state="attached")
        places = figure.locator("svg [data-part='x-axis tick label'] text").evaluate_all(left)
        gaps[axis] = [b - a for a, b in itertools.pairwise(places)]
    assert max(gaps["index"]) == pytest.approx(min(gaps["index"]), abs=1)
    assert gaps["log"] != pytest.approx(gaps["index"], abs=1)
    assert gaps["linear"] != pytest.approx(gaps["log"], abs=1)


def test_a_token_is_searched_and_features_sorted_by_the_step_they_formed_at(report: Path, open_page: Open) -> None:
    page = open_page(report, "#features")
    alive = int((~Track.open(report.parent)[-1].features["dead"]).sum())
    assert page.locator("#count").inner_text() == f"{alive} of 64 features"
    headers = page.locator("table.features th").all_inner_texts()
    column = next(i for i, text in enumerate(headers) if text.startswith("Formed")) + 1
    page.get_by_role("button", name="Formed", exact=False).first.click()
    steps = [float(text) for text in shown(page, column) if text != "\u2013"]
    assert steps
    assert steps == sorted(steps)
    assert page.locator("th[aria-sort=ascending]").count() == 1
    page.fill("#search", "onerror")
    page.check("input[type=checkbox]")  # dead ones too
    assert "7" in shown(page, 1)
    assert len(shown(page, 1)) < 64
    page.fill("#search", "no such token")
    assert page.locator("#count").inner_text().startswith("0 of 64 features")


def test_the_table_is_saved_with_what_its_filters_leave(report: Path, open_page: Open) -> None:
    page = open_page(report, "#features")
    page.fill("#search", "12")
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Save the features shown as CSV").click()
    head, *rows = csv.reader(Path(waiting.value.path()).read_text(encoding="utf-8").splitlines())
    assert head[:2] == ["feature", "tokens"]
    assert {"class", "formed", "firing", "drift", "identity"} <= set(head)
    assert [row[0] for row in rows] == shown(page, 1)
    frequency = Track.open(report.parent)[-1].features["firing_frequency"][12]
    assert float(next(row for row in rows if row[0] == "12")[head.index("firing")]) == pytest.approx(
        frequency, rel=1e-6
    )


def test_a_feature_opens_by_keyboard_and_its_link_leads_back(report: Path, open_page: Open) -> None:
    page = open_page(report, "#features")
    third = shown(page, 1)[2]
    page.locator(".scroll").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector("#slider")
    assert page.url.endswith(f"#feature={third}&step=10")
    page.locator("#slider").focus()
    page.keyboard.press("ArrowLeft")
    assert page.url.endswith(f"#feature={third}&step=4")
    assert page.locator("#now").inner_text() == "LLM step 4"
    assert page.locator(".column.now h3").inner_text() == "LLM step 4"
    raised = page.locator(".raised").inner_text()
    again = open_page(report, "#" + page.url.partition("#")[2])
    again.wait_for_selector("#slider")
    assert again.locator("#now").inner_text() == "LLM step 4"
    assert again.locator(".raised").inner_text() == raised


def test_play_goes_through_training_and_stops_at_the_end(report: Path, open_page: Open) -> None:
    page = open_page(report, "#feature=2&step=4")
    page.click("#play")
    page.wait_for_selector("text=LLM step 10 >> visible=true", timeout=5000)
    page.wait_for_selector("#play:has-text('play')", timeout=5000)
    assert page.url.endswith("step=10")


def test_a_token_that_is_markup_is_shown_as_text(report: Path, open_page: Open) -> None:
    page = open_page(report, "#feature=7&step=0")
    page.wait_for_selector(".effects")
    assert page.locator(".raised li").first.inner_text().startswith(NASTY)
    assert NASTY in page.locator(".contexts").first.inner_text()
    page.locator(".contexts button").first.click()
    assert NASTY in page.locator("dialog .document").inner_text()
    assert page.locator("img").count() == 0
    assert page.title().startswith("script><img onerror=")  # the last part of the model's name


def test_figures_are_saved_as_svg_and_csv(report: Path, open_page: Open) -> None:
    page = open_page(report)
    for kind, begin in (("SVG", "<svg"), ("CSV", "step,after training,before training")):
        with page.expect_download() as waiting:
            page.get_by_role("button", name="Unexplained variance", exact=False).filter(has_text=kind).click()
        text = Path(waiting.value.path()).read_text()
        assert text.startswith(begin)
        assert "var(" not in text  # a variable of the page means nothing in a file of its own


def test_an_old_result_is_marked_beside_its_figures_and_above_what_is_made_of_it(
    analysed: Path, tmp_path: Path, open_page: Open
) -> None:
    track = Track.open(shutil.copytree(analysed, tmp_path / "track"))
    text = old_drift(track)
    page = open_page(write_report([track], tmp_path / "report.html").path)
    note = page.locator(".outdated")
    assert note.all_inner_texts() == [
        f"Old result of drift: {text}. "
        f"Run saetrack analyze {track.path} --analyses+=Drift, then write the report again."
    ]
    assert page.locator("#section-drift .outdated").count() == 1
    for view in ("#features", "#feature=9"):
        page.goto(page.url.partition("#")[0] + view)
        page.wait_for_selector(".outdated")


def test_a_report_in_a_folder_loads_details_when_asked(analysed: Path, tmp_path: Path, open_page: Open) -> None:
    path = write_report([Track.open(analysed)], tmp_path / "large.html", max_bytes=1000).path
    page = open_page(path, "#feature=9&step=1")
    page.wait_for_selector(".contexts")
    assert page.locator(".columns .column").count() == 3


def test_the_picture_of_a_plugin_is_an_image_and_its_table_can_be_saved(
    analysed: Path, tmp_path: Path, open_page: Open
) -> None:
    track = Track.open(shutil.copytree(analysed, tmp_path / "track"))
    add_plugin(track)
    page = open_page(write_report([track], tmp_path / "report.html").path, "#overview&section=my_plugin")
    picture = page.locator("#my_plugin-picture-curve img")
    assert picture.evaluate("(image) => image.decode().then(() => image.naturalWidth)") > 100
    assert page.locator("#section-my_plugin").evaluate("(e) => Math.abs(e.getBoundingClientRect().top)") < 300
    with page.expect_download() as waiting:
        page.get_by_role("button", name="few", exact=False).click()
    assert Path(waiting.value.path()).read_text() == "step,name,value\n0,'=a,0.5\n10,,\n"


def test_two_tracks_stand_beside_each_other(analysed: Path, tmp_path: Path, open_page: Open) -> None:
    track = Track.open(analysed)
    page = open_page(write_report([track, track], tmp_path / "both.html").path)
    assert page.locator("h3:has-text('Unexplained variance')").all_inner_texts() == [
        "A: Unexplained variance",
        "B: Unexplained variance",
    ]
    page.get_by_role("button", name="Features", exact=True).click()
    page.get_by_role("radio").nth(1).check()
    page.locator("tr[data-feature]").first.click()
    page.wait_for_selector("#slider")
    assert page.url.endswith("&track=B")
    feature = page.url.partition("feature=")[2].partition("&")[0]
    page.locator("dt:has-text('Nearest in A') + dd a").click()
    page.wait_for_selector(f"h1:has-text('Feature {feature} of A')")  # the two are the same track


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desk"])
@pytest.mark.parametrize("view", ["#overview", "#features", "#feature=7&step=4"])
def test_axe_finds_nothing_serious(view: str, width: int, scheme: str, report: Path, open_page: Open) -> None:
    size = {"width": width, "height": 850}
    page = open_page(report, view, viewport=size, color_scheme=scheme, bypass_csp=True)
    page.wait_for_selector("h1")
    page.wait_for_timeout(200)
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run().then((r) => r.violations)")
    serious = [
        (v["id"], [n["html"][:120] for n in v["nodes"][:3]]) for v in found if v["impact"] in ("serious", "critical")
    ]
    assert serious == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out to the side


def faults(page: Page, markup: str) -> list[str]:
    """What the validator finds in a page, the data and scripts in it left out."""
    page.evaluate(VALIDATOR.read_text())
    check = """async ([markup, rules]) => {
        const document = markup.replace(/(<script[^>]*>)[^]*?(<\\/script>)/g, "$1$2");
        const loader = new htmlValidate.StaticConfigLoader({ extends: ["html-validate:recommended"], rules });
        const { results } = await new htmlValidate.HtmlValidate(loader).validateString(document);
        return results.flatMap((r) => r.messages.map((m) => `${m.ruleId}: ${m.message} (${m.selector})`));
    }"""
    found: list[str] = page.evaluate(check, [markup, NOT_MARKUP])
    return found


@pytest.mark.parametrize("view", ["#overview", "#features", "#feature=9&step=4"])
def test_what_the_page_shows_is_valid_html(view: str, report: Path, open_page: Open) -> None:
    page = open_page(report, view, bypass_csp=True)
    page.wait_for_selector("h1")
    for numbers in page.locator("summary:has-text('Numbers')").all()[:2]:
        numbers.click()
    page.wait_for_timeout(200)
    assert faults(page, "<!DOCTYPE html>\n" + page.evaluate("document.documentElement.outerHTML")) == []


def test_the_file_is_valid_html_and_a_fault_in_it_would_be_found(report: Path, open_page: Open) -> None:
    page, markup = open_page(report, bypass_csp=True), report.read_text(encoding="utf-8")
    assert faults(page, markup) == []
    broken = markup.replace("<main ", "<span><div></div></span><main ", 1)
    assert any("element-permitted-content" in fault for fault in faults(page, broken))
