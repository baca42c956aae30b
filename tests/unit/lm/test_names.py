"""Real names of published series, and names that say no step."""

import pytest

from saetrack.lm.names import family_of, parse_name, parse_repo_id, series_of_names
from saetrack.lm.registry import registry

B, T = 10**9, 10**12

# Names that stand on the Hub, in model cards, in training code or in what a trainer writes, by where they are.
# name -> (stage, step, ingredient, tokens); None where the name says no step
REAL: dict[str, dict[str, tuple[str, int, int | None, int | None] | None]] = {
    "Pythia, PolyPythias": {
        "step0": ("", 0, None, None),
        "step512": ("", 512, None, None),
        "step1000": ("", 1000, None, None),
        "step143000": ("", 143000, None, None),
        "main": None,
    },
    "stanford-crfm/*-gpt2-*": {
        "checkpoint-0": ("", 0, None, None),
        "checkpoint-550": ("", 550, None, None),
        "checkpoint-9900": ("", 9900, None, None),
        "checkpoint-400000": ("", 400000, None, None),
    },
    "allenai/OLMo-1B, OLMo-7B, OLMo-1B-0724-hf": {
        "step0-tokens0B": ("", 0, None, 0),
        "step1000-tokens2B": ("", 1000, None, 2 * B),
        "step1000-tokens4B": ("", 1000, None, 4 * B),
        "step20000-tokens84B": ("", 20000, None, 84 * B),
        "step117850-tokens494B": ("", 117850, None, 494 * B),
        "step337700-tokens1416B": ("", 337700, None, 1416 * B),
        "step557000-tokens2464B": ("", 557000, None, 2464 * B),
        "step738020-tokens3095B": ("", 738020, None, 3095 * B),
    },
    "allenai/OLMoE-1B-7B-0924": {
        "step5000-tokens20B": ("", 5000, None, 20 * B),
        "step1220000-tokens5117B": ("", 1220000, None, 5117 * B),
        "step1223842-tokens5100B": ("", 1223842, None, 5100 * B),
        "fp32": None,
    },
    "allenai/OLMo-2-*": {
        "stage1-step0-tokens0B": ("stage1", 0, None, 0),
        "stage1-step150-tokens1B": ("stage1", 150, None, B),
        "step150-tokens1B": ("", 150, None, B),
        "stage1-step10000-tokens21B": ("stage1", 10000, None, 21 * B),
        "stage1-step928646-tokens3896B": ("stage1", 928646, None, 3896 * B),
        "stage1-step596057-tokens5001B": ("stage1", 596057, None, 5001 * B),
        "stage1-step721901-tokens6056B": ("stage1", 721901, None, 6056 * B),
        "stage1-step1907359-tokens4001B": ("stage1", 1907359, None, 4001 * B),
        "stage2-ingredient1-step1000-tokens5B": ("stage2", 1000, 1, 5 * B),
        "stage2-ingredient3-step11931-tokens50B": ("stage2", 11931, 3, 50 * B),
        "stage2-ingredient2-step11921-tokens101B": ("stage2", 11921, 2, 101 * B),
        "stage2-ingredient4-step35773-tokens300B": ("stage2", 35773, 4, 300 * B),
    },
    "allenai/Olmo-3-1025-7B, Olmo-3-1125-32B": {
        "stage1-step1000": ("stage1", 1000, None, None),
        "stage1-step1413814": ("stage1", 1413814, None, None),
        "stage2-step47684": ("stage2", 47684, None, None),
        "stage3-step11921": ("stage3", 11921, None, None),
        "stage1-step656000": ("stage1", 656000, None, None),
        "stage2-ingredient1-step0": ("stage2", 0, 1, None),
        "stage2-ingredient1-step21000": ("stage2", 21000, 1, None),
        "stage2-step47684-mix-gen-mc-only-from-2T-ckpt": None,  # another run, from an earlier checkpoint
        "stage2-step47684-mix-round5-from-2T-ckpt": None,
    },
    "LLM360/Amber": {
        "ckpt_000": ("", 0, None, None),
        "ckpt_100": ("", 100, None, None),
        "ckpt_358": ("", 358, None, None),
    },
    "HuggingFaceTB/SmolLM2-*-intermediate-checkpoints": {
        "step-125000": ("", 125000, None, None),
        "step-240000": ("", 240000, None, None),
        "step-1920000": ("", 1920000, None, None),
        "step-5000000": ("", 5000000, None, None),
    },
    "HuggingFaceTB/SmolLM3-3B-checkpoints": {
        "stage1-step-40000": ("stage1", 40000, None, None),
        "stage1-step-3440000": ("stage1", 3440000, None, None),
        "stage2-step-4200000": ("stage2", 4200000, None, None),
        "stage3-step-4720000": ("stage3", 4720000, None, None),
        "lc-4k-to-32k-step-20000": ("lc-4k-to-32k", 20000, None, None),
        "lc-32k-to-64k-step-4000": ("lc-32k-to-64k", 4000, None, None),
        "it-SFT": None,
    },
    "HuggingFaceFW/ablation-model-*": {
        "step-001000-2BT": ("", 1000, None, 2 * B),
    },
    "TinyLlama/tinyLlama-intermediate-checkpoints": {
        "step-5k-token-10B": ("", 5_000, None, 10 * B),
        "step-240k-token-503B": ("", 240_000, None, 503 * B),
        "step-480k-token-1007B": ("", 480_000, None, 1007 * B),
    },
    "swiss-ai/Apertus-*": {
        "step50000-tokens210B": ("", 50000, None, 210 * B),
        "step1432000-tokens6014B": ("", 1432000, None, 6014 * B),
        "step2627139-tokens15T": ("", 2627139, None, 15 * T),
        "step1155828-tokens15T": ("", 1155828, None, 15 * T),
        "longctx-step50": ("longctx", 50, None, None),
    },
    "marin-community/marin-8b-base": {"kestrel": None, "jellyfish": None, "deeper-starling": None},
    "B-GPT, Lucie, reinforcement learning, Megatron on the Hub": {
        "128000": ("", 128000, None, None),
        "step0050000": ("", 50000, None, None),
        "extension_step0001220": None,
        "step_360": ("", 360, None, None),
        "step-0250": ("", 250, None, None),
        "iter_0480000": ("", 480000, None, None),
        "refs/pr/1": None,
    },
    "what trainers write": {
        "checkpoint-500": ("", 500, None, None),  # Trainer
        "tmp-checkpoint-500": None,  # before it is renamed
        "epoch=0-step=3919.ckpt": ("", 3919, None, None),  # Lightning
        "last.ckpt": None,
        "step-10": ("", 10, None, None),  # torchtitan
        "ckpt.pt": None,  # nanoGPT
        "step1000-unsharded": ("", 1000, None, None),  # OLMo
        "global_step143000": ("", 143000, None, None),  # DeepSpeed
        "checkpoint_12": ("", 12, None, None),  # Orbax
        "TinyLlama-1.1B-intermediate-step-1431k-3T": None,  # a repository, not a branch
    },
}
# Spellings that people use, and what looks like a step and is none.
OTHERS: dict[str, tuple[str, int, int | None, int | None] | None] = {
    "ckpt_2000.pt": ("", 2000, None, None),
    "step-1195k-token-2.5T": ("", 1_195_000, None, 2_500 * B),
    "epoch=12-step=100": ("", 100, None, None),
    "step=250.ckpt": ("", 250, None, None),
    "checkpoint_step_7": ("", 7, None, None),
    "Step1000": ("", 1000, None, None),
    "step1.5k": ("", 1500, None, None),
    "epoch3": None,
    "step": None,
    "step-": None,
    "final-step7": None,
    ".step3": None,
    "step1000.5": None,
    "step1000-tokens": None,
    "steps1000": None,
    "stage1": None,
    "70m": None,
    "v1.0": None,
    "resume": None,
    "step-5B": None,
    "step\u0661": None,  # a digit, but not one of ours
    "step1\n": None,
    "step" + "9" * 5000: None,  # no step, and Python refuses to make a number of it
}
NAMES = {name: says for family in REAL.values() for name, says in family.items()} | OTHERS

REPOS = {
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": (1_431_000, 3 * T),
    "TinyLlama/TinyLlama-1.1B-intermediate-step-955k-token-2T": (955_000, 2 * T),
    "PY007/TinyLlama-1.1B-step-50K-105b": (50_000, 105 * B),
    "google/multiberts-seed_0-step_20k": (20_000, None),
    "google/multiberts-seed_4-step_2000k": (2_000_000, None),
    "google/multiberts-seed_0": None,
    "HuggingFaceTB/SmolLM2-135M-intermediate-checkpoints": None,
    "EleutherAI/pythia-410m-seed9": None,
}


def test_sixty_real_names_and_more_are_in_the_table() -> None:
    assert sum(map(len, REAL.values())) >= 60
    assert {"main", "fp32", "kestrel", "it-SFT"} <= {
        n for family in REAL.values() for n, says in family.items() if not says
    }


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:40])
def test_a_real_name_says_its_stage_step_branch_and_tokens(name: str) -> None:
    parsed = parse_name(name)
    got = None if parsed is None else (parsed.stage, parsed.step, parsed.ingredient, parsed.tokens)
    assert got == NAMES[name]


@pytest.mark.parametrize("repo", REPOS)
def test_a_repository_that_is_one_checkpoint_says_its_step(repo: str) -> None:
    parsed = parse_repo_id(repo)
    assert (None if parsed is None else (parsed.step, parsed.tokens)) == REPOS[repo]


def facts(names: list[str], repo: str = "", **more: int) -> list[tuple[int, str, int | None]]:
    return [(n.step, n.name, n.tokens) for n in series_of_names(names, family_of(repo), **more)]


def test_names_are_ordered_by_number_and_the_rest_is_left_out() -> None:
    assert [n for _, n, _ in facts(["step10", "main", "step9", "128"])] == ["step9", "step10"]
    assert [n for _, n, _ in facts(["64000", "main", "128000", "8000"])] == ["8000", "64000", "128000"]


def test_tokens_come_from_the_exact_rate_where_the_rounded_name_agrees() -> None:
    assert facts(["step512"], "EleutherAI/pythia-410m-seed9") == [(512, "step512", 512 * 2_097_152)]
    olmo2 = ["stage1-step1000-tokens5B", "stage1-step2000-tokens17B"]
    assert [t for *_, t in facts(olmo2, "allenai/OLMo-2-1124-7B")] == [1000 * 4_194_304, 17 * B]
    assert [t for *_, t in facts(["ckpt_002"], "LLM360/Amber")] == [7 * B]
    assert [t for *_, t in facts(["step64", "step-001000-2BT"], "somebody/llm")] == [None, 2 * B]


def test_a_rate_of_the_users_takes_the_registrys_place() -> None:
    family = family_of("EleutherAI/pythia-70m", tokens_per_step=10)
    assert series_of_names(["step3"], family)[0].tokens == 30


def test_a_stage_that_counts_anew_goes_on_where_the_one_before_ended() -> None:
    names = ["stage3-step-1", "stage2-step-10", "stage1-step-100", "stage2-step-20"]
    assert [s for s, *_ in facts(names)] == [100, 110, 120, 121]
    known = facts(["stage2-step10", "stage3-step1000", "stage1-step500"], "allenai/Olmo-3-1025-7B")
    assert [s for s, *_ in known] == [500, 1_413_824, 1_413_814 + 47_684 + 1000], (
        "by the registry, not by what is listed"
    )
    ends = [5_929_965_715_456, 100_000_595_968]  # the 5.93 T and the 100 B of the model card
    assert [t for *_, t in known] == [500 * 2**22, ends[0] + 10 * 2**21, sum(ends) + 1000 * 2**22]


def test_step_0_of_a_later_stage_is_the_last_of_the_stage_before() -> None:
    names = ["stage1-step656000", "stage2-ingredient1-step0", "stage2-ingredient1-step7000"]
    assert [n for _, n, _ in facts(names, "allenai/Olmo-3-1125-32B")] == [names[0], names[2]]
    assert [n for _, n, _ in facts(names[:2], "allenai/Olmo-3-1125-32B")] == names[:1]
    early = ["stage1-step928000-tokens3893B", "stage2-ingredient1-step0-tokens0B"]
    assert [s for s, *_ in facts(early, "allenai/OLMo-2-1124-7B")] == [928_000, 928_646], "not the same one"


def test_tokens_behind_a_stage_that_may_be_cut_off_are_unknown_unless_the_registry_has_its_end() -> None:
    names = ["stage1-step10-tokens1B", "stage2-step10-tokens1B"]
    assert [n.tokens for n in series_of_names(names, whole=True)] == [B, 2 * B]
    assert [n.tokens for n in series_of_names(names, whole=False)] == [B, None]
    olmo2 = family_of("allenai/OLMo-2-1124-7B")
    assert series_of_names(names, olmo2, whole=False)[1].tokens == (928_646 + 10) * 2**22


def test_stages_with_one_count_keep_their_numbers() -> None:
    names = ["stage2-step-3500000", "stage1-step-40000", "lc-32k-to-64k-step-4000", "lc-4k-to-32k-step-8000"]
    smollm3 = facts(names, "HuggingFaceTB/SmolLM3-3B-checkpoints")
    assert [s for s, *_ in smollm3] == [40_000, 3_500_000, 4_728_000, 4_744_000], (
        "by the registry, not by what is listed"
    )
    assert [t for *_, t in smollm3] == [40_000 * 2_359_296, 3_500_000 * 2_359_296, None, None]
    assert [s for s, *_ in facts(["stage1-step10", "stage2-step20"])] == [10, 20]


def test_long_contexts_and_strays_find_their_stage() -> None:
    apertus = ["longctx-step100", "step50000-tokens210B"]
    assert [(s, n) for s, n, _ in facts(apertus)] == [(50_000, apertus[1]), (50_100, apertus[0])]
    stray = ["stage1-step1000-tokens5B", "step150-tokens1B", "stage1-step10-tokens1B"]
    assert [s for s, *_ in facts(stray, "allenai/OLMo-2-0425-1B")] == [10, 150, 1000]


def test_tokens_of_a_later_stage_alone_are_unknown() -> None:
    assert facts(["stage2-ingredient1-step10-tokens1B"]) == [(10, "stage2-ingredient1-step10-tokens1B", None)]


def test_one_of_the_parallel_branches_is_chosen_or_the_series_is_refused() -> None:
    names = ["stage1-step8-tokens1B", *(f"stage2-ingredient{i}-step4-tokens1B" for i in (1, 2, 10))]
    with pytest.raises(ValueError, match=r"ingredient1.* and .*ingredient2.* parallel.*`ingredient`, of 1, 2, 10\."):
        facts(names, "allenai/OLMo-2-1124-13B")
    assert facts(names, "allenai/OLMo-2-1124-13B", ingredient=10) == [
        (8, names[0], 8 * 8_388_608),
        (596_061, names[3], 596_061 * 8_388_608),
    ]
    with pytest.raises(ValueError, match=r"`ingredient` is 4, but the names have 1, 2, 10\."):
        facts(names, ingredient=4)


def test_two_names_of_one_step_are_refused() -> None:
    with pytest.raises(ValueError, match=r"checkpoint-4 and step4 are both LLM checkpoints of step 4\."):
        facts(["step4", "checkpoint-4", "step1"])


def test_every_entry_of_the_registry_is_read_and_names_its_source() -> None:
    allowed = {"name", "repos", "source", "tokens_per_step", "stage_steps", "global_stages", "unprefixed"}
    for family in registry()["families"]:
        assert set(family) <= allowed
        assert any(word in family["source"] for word in ("arXiv", "github.com", "huggingface.co", "model card"))
        assert family_of(family["repos"][0].replace("*", "x")).tokens_per_step == family.get("tokens_per_step", {})
    for steps in registry()["subsets"].values():
        assert steps == sorted(set(steps))
