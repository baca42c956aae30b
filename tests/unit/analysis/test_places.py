"""Analyses of a null chain, whose snapshots share one LLM step: they are told apart by their place."""

import pytest

from saetrack.analysis.dictionaries import Dictionaries
from saetrack.analysis.identity import Identity
from saetrack.analysis.quality import Quality
from saetrack.analysis.semantics import Semantics
from saetrack.analysis.sweep import run_analyses
from saetrack.track import Track

from .conftest import add_control


@pytest.fixture
def chain(tiny_track: Track) -> Track:
    fvu = tiny_track[0].metadata["fvu"]
    add_control(tiny_track, "null-chain-0", [0, 0, 0], [fvu, fvu, fvu], kind="null", position=None)
    return Track.open(tiny_track.path / "controls" / "null-chain-0")


def test_no_number_of_a_null_chain_goes_under_an_llm_step_that_others_have_too(chain: Track) -> None:
    made = {"semantics": Semantics(contexts=3), "identity": Identity(replicates=20), "dictionaries": Dictionaries()}
    for name, result in run_analyses(chain, {**made, "quality": Quality()}).items():
        assert result.scalars == {}, name
        assert " step " not in result.summary, name
        assert "place 2 of the chain" in result.summary or name == "dictionaries", name


def test_a_null_chain_cannot_be_restricted_to_stretches(chain: Track) -> None:
    run_analyses(chain, {"identity": Identity(replicates=20)})
    with pytest.raises(ValueError, match="--only_kept needs a track whose steps increase"):
        run_analyses(chain, {"dictionaries": Dictionaries()}, only_kept=True)
