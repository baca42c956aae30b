import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from saetrack.analysis import AnalysisResult
from saetrack.analysis import figures as look
from saetrack.analysis.identity import Identity
from saetrack.analysis.sweep import run_analyses
from saetrack.cli import main
from saetrack.report import write_report
from saetrack.report.contexts import Vocabulary, read_text
from saetrack.report.data import Results
from saetrack.report.features import alive, columns, curves, life, match
from saetrack.report.overview import section, sections
from saetrack.track import Track

from .test_pack import unpack


def core(page: str, number: int = 0) -> tuple[dict, dict[str, np.ndarray]]:
    found = re.search(rf'id="core-{number}"[^>]*>([^<]+)<', page)
    assert found is not None
    return unpack(found[1])


def test_one_file_holds_everything_and_names_nothing_outside(track: Track, tmp_path: Path) -> None:
    written = write_report([track], tmp_path / "report.html")
    page = written.path.read_text()
    assert written.data is None
    assert written.size == written.path.stat().st_size
    assert not re.search(r"<(?:script|link|img)[^>]*(?:src|href)=", page)
    facts, arrays = core(page)
    assert facts["steps"] == [0, 1, 4, 10]
    assert arrays["alive"].shape == (64, 4)
    assert arrays["alive"][5].tolist() == [0, 0, 0, 0]  # dead from the beginning


def test_a_page_that_is_too_large_keeps_its_details_in_a_folder(track: Track, tmp_path: Path) -> None:
    whole = write_report([track], tmp_path / "report.html").path.read_text()
    written = write_report([track], tmp_path / "report.html", max_bytes=1000)
    assert written.data == tmp_path / "report_files"
    chunk = (written.data / "t0-0.js").read_text()
    inline = re.search(r'id="t0-0">([^<]+)<', whole)
    assert inline is not None
    assert chunk == f'saetrackChunk("t0-0", "{inline[1]}");\n'
    assert 'id="t0-0"' not in written.path.read_text()
    write_report([track], tmp_path / "report.html")
    assert not written.data.exists()  # a page that fits again leaves nothing behind


def test_contexts_point_at_the_tokens_of_the_semantics_table(track: Track) -> None:
    vocabulary = Vocabulary()
    text = read_text(Results(track), vocabulary)
    assert text is not None
    table = pd.read_parquet(track.analyses_dir / "semantics" / "contexts.parquet")
    words, arrays = vocabulary.texts, text.contexts
    for found in table.sample(40, random_state=0).itertuples():
        at = found.feature, track.steps.index(found.step), found.rank
        row, column = int(arrays["context.row"][at]), int(arrays["context.column"][at])
        begin = column - found.center
        assert [words[n] for n in text.rows[row, begin : begin + len(found.tokens)]] == list(found.tokens)
        shades = arrays["context.shades"][at][text.left - found.center :][: len(found.activations)]
        strongest = arrays["context.activation"][at[:2]].max()
        for shade, activation in zip(shades, found.activations, strict=True):
            if np.isnan(activation):
                assert shade == 255
            else:
                assert shade / 254 == pytest.approx(activation / strongest, abs=1 / 254)


def test_the_search_words_of_a_feature_are_the_tokens_of_its_contexts(track: Track) -> None:
    vocabulary = Vocabulary()
    text = read_text(Results(track), vocabulary)
    assert text is not None
    table = pd.read_parquet(track.analyses_dir / "semantics" / "contexts.parquet")
    for feature in (0, 5, 17, 63):
        numbers = text.word_numbers[text.words[feature] : text.words[feature + 1]]
        assert {vocabulary.texts[n] for n in numbers} == set(table[table["feature"] == feature]["token"])


def test_sections_without_their_analysis_name_the_command(track: Track) -> None:
    found = {section["id"]: section for section in sections(Results(track))}
    assert found["formation"]["class"] == "Formation"
    assert found["formation"]["figures"] == []
    assert "class" not in found["quality"]
    assert len(found["quality"]["figures"]) == 5


def old_drift(track: Track) -> str:
    """Make the drift of a track one of its first two snapshots; what is to be said of it."""
    path = track.analyses_dir / "drift" / "result.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "settings": {**facts["settings"], "steps": [0, 1]}}))
    return "made on 2 of the track's 4 snapshots (LLM steps 0 to 1)"


def test_an_old_result_is_said_to_be_old_with_the_command_that_renews_it(
    track: Track, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Results(track).outdated() == {}
    text, command = old_drift(track), f"saetrack analyze {track.path} --analyses+=Drift"
    page = write_report([track], tmp_path / "report.html").path.read_text()
    assert core(page)[0]["outdated"] == {"drift": {"text": text, "command": command}}
    main(["report", str(track.path)])
    assert f"Its drift is old, {text}. Run `{command}`, then write the report again." in capsys.readouterr().out
    for figure in (track.plot.drift(), track.plot.feature(3)):
        assert f"old result of drift: {text}" in figure.texts[0].get_text()
    assert "old" not in track.plot.quality().texts[0].get_text()


def test_a_lost_snapshot_is_named_in_the_page(track: Track, tmp_path: Path) -> None:
    shutil.rmtree(track[1].path)
    page = write_report([Track.open(track.path)], tmp_path / "report.html").path.read_text()
    assert core(page)[0]["about"]["missing"] == [1]


def test_classes_and_formed_steps_show_in_the_table(track: Track) -> None:
    path = track.analyses_dir / "semantics" / "features.parquet"
    table = pd.read_parquet(path)
    table["class"] = np.where(table["feature"] % 2 == 0, "token", "concept")
    table.to_parquet(path)
    folder = track.analyses_dir / "formation"
    folder.mkdir()
    formed = pd.DataFrame(
        {"feature": [3, 7], "formed_step": [4.0, np.nan], "formed_low": [1.0, 4.0], "formed_high": [4, 10.0]}
    )
    formed.to_parquet(folder / "features.parquet")
    found = columns(Results(track))
    assert found.values["formed"][3] == 4
    assert [found.values[f"formed_{end}"][3] for end in ("low", "high")] == [1, 4]
    assert np.isnan(found.values["formed"][[0, 7]]).all()
    names = next(spec for spec in found.specs if spec["key"] == "class")["names"]
    assert names[int(found.values["class"][2])] == "token"
    stack = next(f for s in sections(Results(track)) for f in s["figures"] if f["kind"] == "stack")
    assert np.sum([line["values"] for line in stack["lines"]], axis=0) == pytest.approx(np.ones(4))


def test_every_figure_of_an_analysis_has_a_caption(track: Track) -> None:
    for name in ("quality", "semantics", "drift"):
        facts = json.loads((track.analyses_dir / name / "result.json").read_text())
        assert set(facts["figures"]) <= set(facts["captions"]), name


def test_identity_is_drawn_beside_its_null_and_another_feature(track: Track) -> None:
    run_analyses(track, {"identity": Identity()})
    folder = track.analyses_dir / "identity"
    table = pd.read_parquet(folder / "curves.parquet")
    table.loc[(table["comparison"] == "null") & (table["step"] == 4), ["mean", "low", "high"]] = [0.9, 0.8, 0.95]
    table.to_parquet(folder / "curves.parquet")
    figures = section(Results(track), "identity")["figures"]
    assert [figure["title"] for figure in figures] == [
        "Same index at neighbouring checkpoints",
        "Same index at both ends",
        "Survival of identity",
    ]
    assert len({figure["id"] for figure in figures}) == 3
    lines = {line["name"]: line for line in figures[0]["lines"]}
    before = table[table["comparison"] == "to_previous"].set_index("step").loc[track.steps, "mean"]
    assert lines["with the checkpoint before"]["values"][1:] == pytest.approx(before.tolist()[1:], rel=1e-5)
    null = lines["where the LLM did not change"]
    assert (null["null"], null["values"], null["high"]) == (True, [None, None, 0.9, None], [None, None, 0.95, None])
    assert lines["another feature"]["null"]
    assert figures[2]["lines"][0]["values"][0] == 1


def test_a_track_without_any_analysis_has_a_report(track: Track, tmp_path: Path) -> None:
    shutil.rmtree(track.analyses_dir)
    facts, arrays = core(write_report([track], tmp_path / "r.html").path.read_text())
    assert set(facts["missing"]) == {"profile", "semantics", "formation", "drift"}
    assert "rows" not in arrays


def test_the_command_writes_into_the_track_and_says_where(track: Track, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(track.path)])
    assert capsys.readouterr().out.startswith(f"{track.path / 'report.html'} (")
    main(["report", str(track.path), str(track.path), "--to", str(track.path / "both.html")])
    assert core((track.path / "both.html").read_text(), 1)[0]["steps"] == track.steps


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["{track}", "{track}"], "3 were given"),
        (["--to", "page.txt"], "--to is page.txt, but the report is one HTML file"),
    ],
    ids=["three tracks", "not html"],
)
def test_wrong_arguments_get_one_line(
    track: Track, extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["report", str(track.path), *(e.format(track=track.path) for e in extra)])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_phases_show_every_perspective_its_rates_and_its_boundaries(track: Track) -> None:
    folder = track.analyses_dir / "phases"
    folder.mkdir()
    (folder / "result.json").write_text("{}")
    row = {"perspective": ["drift"], "axis": ["step"], "step": [4], "low": [1], "high": [10]}
    pd.DataFrame(row).to_parquet(folder / "boundaries.parquet")
    scores = pd.DataFrame({"perspective": ["drift", "model_loss"], "axis": ["step", "step"], "phases": [2, 1]})
    scores.to_parquet(folder / "scores.parquet")
    (figure,) = section(Results(track), "phases")["figures"]
    assert figure["perspectives"] == ["drift, step", "model loss, step"]
    assert figure["marks"] == [{"perspective": "drift, step", "step": 4, "low": 1, "high": 10, "robust": True}]

    both = [pd.DataFrame({**row, "robust": [False]}), pd.DataFrame({**row, "axis": ["log-step"], "robust": [False]})]
    pd.concat(both).to_parquet(folder / "boundaries.parquet")
    pd.concat([scores, scores.assign(axis="log-step")]).to_parquet(folder / "scores.parquet")
    rates = {"perspective": "drift", "axis": "log-step", "from_step": [0, 1], "step": [1, 4], "rate": [0.5, 2.0]}
    pd.DataFrame(rates).to_parquet(folder / "rates.parquet")
    (figure,) = section(Results(track), "phases")["figures"]
    assert figure["perspectives"] == ["drift", "model loss"]  # the other axes only check the boundaries
    assert figure["marks"] == [{"perspective": "drift", "step": 4, "low": 1, "high": 10, "robust": False}]
    assert figure["rates"][0] == {"perspective": "drift", "from": 0, "to": 1, "rate": 0.5, "share": 0.25}


def add_plugin(track: Track) -> None:
    """The result of an analysis that the report does not know."""
    figure, (ax,) = look.small_multiples(1)
    ax.plot([0, 1], [0, 1])
    table = pd.DataFrame({"step": [0, 10], "name": ["=a", None], "value": [0.5, np.nan]})
    AnalysisResult(
        tables={"few": table, "many": pd.DataFrame({"x": range(3000)})},
        figures={"curve": figure},
        scalars={"how_much": {0: 0.25, 4: 0.5, 10: math.nan}, "once": {10: 1.0}},
        settings={"seed": 3},
        summary="A plugin's.",
        captions={"curve": "What it shows."},
    ).save(track.analyses_dir / "my_plugin")


def test_an_analysis_that_the_report_does_not_know_has_its_section(track: Track) -> None:
    add_plugin(track)
    found = sections(Results(track))[-1]
    assert (found["id"], found["title"], found["summary"]) == ("my_plugin", "My plugin", "A plugin's.")
    line, picture = found["figures"]  # a scalar of one step is no curve
    assert line["lines"][0]["values"] == [0.25, None, 0.5, None]
    assert picture["svg"].lstrip().startswith("<?xml")
    assert picture["note"] == "What it shows."
    assert found["tables"] == [{"name": "few", "rows": [["step", "name", "value"], [0, "=a", 0.5], [10, None, None]]}]


def test_effects_are_drawn_for_each_measure_beside_another_features_direction(track: Track) -> None:
    rows = [
        {"step": step, "measure": measure, "quantity": quantity, "mean": size * factor, "low": 0.0, "high": 1.0}
        for step in track.steps
        for measure, factor in (("loss", 1), ("divergence", 2))
        for quantity, size in (("effect", 0.5), ("null", 0.2), ("excess", 0.3))
    ]
    AnalysisResult(tables={"population": pd.DataFrame(rows)}).save(track.analyses_dir / "causal")
    loss, divergence = section(Results(track), "causal")["figures"]
    assert [(line["name"], line["values"][0], line["null"]) for line in loss["lines"]] == [
        ("without the feature", 0.5, False),
        ("excess", 0.3, False),
        ("without another feature's direction", 0.2, True),
    ]
    assert divergence["lines"][0]["values"] == [1.0] * 4
    assert loss["id"] != divergence["id"]


def test_life_is_empty_where_a_feature_is_dead_and_dark_where_it_is_itself(track: Track) -> None:
    strip = life(Results(track))
    assert strip[5].tolist() == [0, 0, 0, 0]
    assert strip[7, 0] == 255  # where it begins
    correlation = track[2].features["functional_correlation"][7]
    assert strip[7, 2] == pytest.approx(1 + 254 * max(correlation, 0), abs=0.51)


def test_what_is_not_known_to_be_dead_is_shown(track: Track) -> None:
    for snapshot in track:  # as an imported one
        table = snapshot.features.drop(columns="dead").assign(firing_frequency=np.nan)
        table.to_parquet(snapshot.path / "features.parquet")
    assert alive(Results(Track.open(track.path))).all()


def test_firing_frequency_has_wilsons_interval_and_the_quartiles_of_all(track: Track) -> None:
    for snapshot in track:
        facts = {**snapshot.metadata, "evaluation_tokens": 180}
        (snapshot.path / "metadata.json").write_text(json.dumps(facts))
    frequency = next(f for f in curves(Results(Track.open(track.path))).of(5) if f["title"] == "Firing frequency")
    dead, usual = frequency["lines"]
    assert dead["low"].tolist() == [0, 0, 0, 0]
    assert dead["high"] == pytest.approx([1.96**2 / (180 + 1.96**2)] * 4, rel=1e-4)  # Wilson's at 0 of 180
    firing = track[1].features["firing_frequency"].to_numpy()
    assert usual["values"][1] == pytest.approx(np.median(firing[firing > 0]), rel=1e-5)


def test_features_of_one_llm_are_matched_with_those_that_live_in_the_other_track(track: Track, analysed: Path) -> None:
    other = Track.open(analysed)
    found = match(track, other)
    assert found is not None
    indices, cosines, chance = found
    living = ~other[-1].features["dead"]
    assert indices[living].tolist() == np.flatnonzero(living).tolist()  # each is nearest to itself
    assert cosines[living] == pytest.approx(1, abs=1e-5)
    assert cosines[5] < 1  # which is dead there
    assert 0.3 < chance < 0.95  # of 63 directions in 16 dimensions
    other.facts["model"] = "another"
    assert match(track, other) is None
