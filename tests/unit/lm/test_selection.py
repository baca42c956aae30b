import numpy as np
import pytest

from saetrack.lm import LLMCheckpoint
from saetrack.lm.selection import Selection

PYTHIA = [0, *(2**i for i in range(10)), *range(1000, 143_001, 1000)]
SERIES = [LLMCheckpoint("llm", f"step{step}", step, 2_097_152 * step) for step in PYTHIA]


def steps(text: str, series: list[LLMCheckpoint] = SERIES) -> list[int]:
    return [checkpoint.step for checkpoint in Selection(text).of(series)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", PYTHIA),
        ("every:50", [0, 40_000, 90_000, 140_000]),
        ("every:1", PYTHIA),
        ("dense:4", [0, 1, 2, 4]),
        ("dense:512+every:40", [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 40_000, 80_000, 120_000]),
        ("dense:2+log:3", [0, 1, 2, 512, 143_000]),
        ("0,1,4", [0, 1, 4]),
        ("0, 1 ,1_000, 2k", [0, 1, 1000, 2000]),
        ("every:50+143000", [0, 40_000, 90_000, 140_000, 143_000]),
        ("7000", [7000]),
        ("steps:256-2000", [256, 512, 1000, 2000]),
        ("steps:141k-", [141_000, 142_000, 143_000]),
        ("steps:-2", [0, 1, 2]),
        ("tokens:1B-3B", [512, 1000]),
        ("tokens:-4.2M", [0, 1, 2]),
        ("steps:0-3", [0, 1, 2]),
    ],
)
def test_a_text_takes_these_steps(text: str, expected: list[int]) -> None:
    assert steps(text) == expected


def test_log_spaced_takes_exactly_as_many_as_asked_with_both_ends() -> None:
    for n in range(2, len(PYTHIA) + 1):
        got = steps(f"log:{n}")
        assert len(got) == n
        assert got == sorted(set(got))
        assert {got[0], got[-1]} == {0, 143_000}
    assert steps("log:1") == [0]


def test_log_spaced_is_even_in_the_logarithm_where_the_series_allows_it() -> None:
    series = [LLMCheckpoint("llm", None, step) for step in range(1, 4097)]
    assert steps("log:13", series) == [2**i for i in range(13)]
    got = np.log(steps("log:25", series))[10:]  # whole steps are too wide below
    assert got == pytest.approx(np.linspace(0, np.log(4096), 25)[10:], abs=0.5 / 32)


@pytest.mark.parametrize(
    ("name", "number", "gap"),
    [("pythia-160m-deduped", 30, 20_000), ("pythia-410m-deduped", 29, 20_000), ("pythia-1.4b-deduped", 30, 20_000)],
)
def test_the_papers_subsets_are_in_the_series(name: str, number: int, gap: int) -> None:
    got = steps(f"paper:{name}")
    assert len(got) == number
    assert (got[0], got[-1]) == (0, 143_000)
    assert max(np.diff(got)) == gap


def test_the_papers_gpt2_subset_is_of_crfms_checkpoints() -> None:
    crfm = [*range(0, 100, 10), *range(100, 2000, 50), *range(2000, 20_000, 100), *range(20_000, 400_001, 1000)]
    assert len(crfm) == 609
    indices = [*range(11), 11, 16, 21, 26, *range(31, 172, 10), *range(181, 602, 30), 608]
    series = [LLMCheckpoint("gpt2", None, step) for step in crfm]
    for size in ("small", "medium"):
        assert steps(f"paper:stanford-gpt2-{size}-a", series) == [crfm[i] for i in indices]


@pytest.mark.parametrize(
    "text",
    [
        "some",
        "every",
        "every:0",
        "every:x",
        "log:",
        "log:-3",
        "dense",
        "1,x",
        "4,2",
        "1,1",
        "steps:5",
        "steps:-",
        "steps:9-2",
        "steps:1-2-3",
        "tokens:1Q-2",
        "all+",
        "+every:2",
        "all:3",
        "1.5",
        "every:2.5",
    ],
)
def test_what_is_no_choice_says_what_one_is(text: str) -> None:
    with pytest.raises(ValueError, match=r"no choice of LLM checkpoints; expected all, every:10, log:20, .* joined by"):
        Selection(text)


def test_a_choice_that_the_series_cannot_meet_says_why() -> None:
    with pytest.raises(ValueError, match=r"no subset 'pythia' of the paper's; expected one of pythia-160m-deduped, "):
        Selection("paper:pythia")
    with pytest.raises(ValueError, match=r"LLM step 3 is asked for.*nearest are \[1, 2, 4\]"):
        steps("0,3")
    with pytest.raises(ValueError, match=r"'steps:150k-' takes none of the 154 .* 0 to 143000"):
        steps("steps:150k-")
    with pytest.raises(ValueError, match="log:200 asks for 200 LLM checkpoints, but there are 154"):
        steps("log:200")
    with pytest.raises(ValueError, match=r"tokens of every LLM checkpoint, and those of step 4 .*`tokens_per_step`"):
        steps("tokens:1-2", [LLMCheckpoint("llm", None, 4)])
