import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from saetrack.analysis.identity import Identity
from saetrack.analysis.sweep import run_analyses
from saetrack.cli import main
from saetrack.report import write_report
from saetrack.report.contexts import Vocabulary, read_text
from saetrack.report.data import Results
from saetrack.report.features import columns
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


def test_phases_show_every_perspective_and_its_boundaries(track: Track) -> None:
    folder = track.analyses_dir / "phases"
    folder.mkdir()
    (folder / "result.json").write_text("{}")
    row = {"perspective": ["drift"], "axis": ["step"], "step": [4], "low": [1], "high": [10]}
    pd.DataFrame(row).to_parquet(folder / "boundaries.parquet")
    scores = pd.DataFrame({"perspective": ["drift", "model_loss"], "axis": ["step", "step"], "phases": [2, 1]})
    scores.to_parquet(folder / "scores.parquet")
    (figure,) = next(s for s in sections(Results(track)) if s["id"] == "phases")["figures"]
    assert figure["perspectives"] == ["drift, step", "model loss, step"]
    assert figure["marks"] == [{"perspective": "drift, step", "step": 4, "low": 1, "high": 10}]
