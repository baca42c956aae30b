import weakref
from collections.abc import Callable, Generator
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPTNeoXForCausalLM

from saetrack.lm import LLMCheckpoint, TokenRows, read_activations
from saetrack.training.stream import ROWS_PER_FORWARD, ActivationStream, Batch, StageOrder, forwards, harvest

HOOKPOINT = "gpt_neox.layers.0"
CONTEXT = 16
BATCH = 64

Filled = Generator[float, None, Batch]


def rows_with_bos(n: int, seed: int = 0) -> TokenRows:
    """BOS (id 0) begins every row and, here and there, another document in it."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 60, size=(n, CONTEXT)).astype(np.uint16)
    tokens[rng.random(tokens.shape) < 0.1] = 0
    tokens[:, 0] = 0
    return TokenRows(tokens, np.zeros(tokens.shape, dtype=np.int32), bos_token_id=0)


ROWS = rows_with_bos(400)
ORDER = StageOrder(ROWS, tokens=1600, batch_size=BATCH, chunk_tokens=300, seed=3, step=8)


def positions(indices: np.ndarray) -> torch.Tensor:
    """In place of an activation its place in the corpus, so that each can be told from all others."""
    places = indices[:, None] * CONTEXT + np.arange(CONTEXT)
    return torch.from_numpy(places[ROWS.usable(indices)])[:, None]


def stream(order: StageOrder, ahead: bool = False) -> ActivationStream:
    def fill(chunk: int) -> Filled:
        x = positions(order.chunk_rows(chunk))
        yield 0.5
        yield 1.0
        return Batch({HOOKPOINT: x, "other": -x}, {HOOKPOINT: 2 * x})

    return ActivationStream(order, fill, ahead=ahead)


def batches(order: StageOrder) -> list[torch.Tensor]:
    return [batch.now[HOOKPOINT].squeeze(1).long() for batch in stream(order)]


def rows_used(order: StageOrder) -> np.ndarray:
    return np.concatenate([order.chunk_rows(c) for c in range(order.chunks)])


def test_a_stage_is_a_function_of_its_arguments() -> None:
    for a, b in zip(batches(ORDER), batches(replace(ORDER)), strict=True):
        assert torch.equal(a, b)
    for other in (replace(ORDER, seed=4), replace(ORDER, step=9)):
        assert not torch.equal(batches(other)[0], batches(ORDER)[0])


def test_every_batch_is_full_and_the_budget_is_kept() -> None:
    got = batches(ORDER)
    assert len(stream(ORDER)) == len(got) == 1600 // BATCH
    assert {len(batch) for batch in got} == {BATCH}
    assert ORDER.batches_per_chunk == 4
    assert ORDER.chunks == 7  # 25 batches, four in each chunk but the last


def test_no_activation_is_seen_twice_and_none_is_of_bos() -> None:
    seen = torch.cat(batches(ORDER)).numpy()
    assert len(np.unique(seen)) == len(seen) == 1600
    assert (ROWS.tokens.reshape(-1)[seen] != 0).all()


def test_hookpoints_are_shuffled_alike() -> None:
    for batch in stream(ORDER):
        assert torch.equal(batch.now[HOOKPOINT], -batch.now["other"])


def test_a_chunk_is_shuffled() -> None:
    first = batches(ORDER)[0].numpy() // CONTEXT
    assert len(np.unique(first)) > BATCH // 4  # from many rows, where reading order would take five


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_work_and_no_row(world_size: int) -> None:
    orders = [replace(ORDER, rank=r, world_size=world_size) for r in range(world_size)]
    per_rank = [batches(order) for order in orders]
    assert {len(b) for b in per_rank} == {25}
    assert {len(batch) for b in per_rank for batch in b} == {BATCH // world_size}
    used = [set(rows_used(order).tolist()) for order in orders]
    assert sum(map(len, used)) == len(set.union(*used))
    assert len(torch.cat([batch for b in per_rank for batch in b]).unique()) == 1600


def test_rows_are_used_once_in_a_stage() -> None:
    used = rows_used(ORDER)
    assert len(np.unique(used)) == len(used)


def test_stages_of_equal_budget_see_the_same_rows_in_another_order() -> None:
    a, b = rows_used(ORDER), rows_used(replace(ORDER, step=16))
    assert not np.array_equal(a, b)
    missing = len(set(a) ^ set(b))
    # each draws all it needs from one sample; only what rounding leaves at the end differs
    assert missing <= 2 * (ORDER.chunks + 1)
    assert missing < 0.2 * len(a)
    assert len(set(a) ^ set(rows_used(replace(ORDER, seed=4)))) > len(a)


def test_a_shorter_stage_sees_a_part_of_the_rows_of_a_longer_one() -> None:
    short, long = replace(ORDER, tokens=640), replace(ORDER, tokens=3200)
    assert len(set(rows_used(short)) - set(rows_used(long))) <= 2 * (long.chunks + 1)


@pytest.mark.parametrize("position", [0, 1, 3, 4, 5, 24], ids=lambda p: f"batch {p}")
def test_a_batch_reached_directly_is_the_batch_reached_by_reading(position: int) -> None:
    direct = stream(ORDER)
    direct.load_state_dict({"position": position, "end": 25})
    rest = [batch.now[HOOKPOINT].squeeze(1).long() for batch in direct]
    expected = batches(ORDER)[position:]
    assert len(rest) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(rest, expected, strict=True))


def test_a_resumed_stream_fills_no_chunk_that_is_done() -> None:
    filled: list[int] = []

    def fill(chunk: int) -> Filled:
        filled.append(chunk)
        yield 1.0
        return Batch({HOOKPOINT: positions(ORDER.chunk_rows(chunk))}, {})

    resumed = ActivationStream(ORDER, fill)
    resumed.load_state_dict({"position": 9, "end": 25})
    next(iter(resumed))
    assert filled == [2]


def test_a_stage_that_ends_early_serves_the_same_batches_up_to_there() -> None:
    short = stream(ORDER)
    short.load_state_dict({"position": 3, "end": 9})
    rest = [batch.now[HOOKPOINT].squeeze(1).long() for batch in short]
    assert len(short) == 25
    assert len(rest) == 6
    assert all(torch.equal(a, b) for a, b in zip(rest, batches(ORDER)[3:9], strict=True))


@pytest.mark.parametrize("state", [{"position": 0, "end": 25}, {"position": 6, "end": 25}, {"position": 3, "end": 9}])
def test_a_stream_that_works_ahead_serves_the_same_batches(state: dict[str, int]) -> None:
    """From the beginning, resumed within a chunk, and where the stage ends early."""
    usual, ahead = stream(ORDER), stream(ORDER, ahead=True)
    for reading in (usual, ahead):
        reading.load_state_dict(state)
    pairs = list(zip(usual, ahead, strict=True))
    assert len(pairs) == state["end"] - state["position"]
    for a, b in pairs:
        assert all(torch.equal(a.now[h], b.now[h]) for h in a.now)
        assert all(torch.equal(a.before[h], b.before[h]) for h in a.before)


def test_the_next_chunk_is_made_in_equal_parts_between_the_batches_of_this_one() -> None:
    done: list[tuple[int, float]] = []

    def fill(chunk: int) -> Filled:
        for i in range(8):
            done.append((chunk, (i + 1) / 8))
            yield (i + 1) / 8
        return Batch({HOOKPOINT: positions(ORDER.chunk_rows(chunk))}, {})

    seen = [done[-1] for _, _ in zip(ActivationStream(ORDER, fill, ahead=True), range(8), strict=False)]
    # the first chunk is made at once; four batches each, so a quarter of the next before each of them
    assert seen == [(chunk, share) for chunk in (1, 2) for share in (0.25, 0.5, 0.75, 1.0)]
    done.clear()
    short = ActivationStream(ORDER, fill, ahead=True)
    short.end = 4
    assert len(list(short)) == 4
    assert {chunk for chunk, _ in done} == {0}  # a chunk that the stage does not come to is not begun


@pytest.mark.gpu
def test_a_gpu_that_works_ahead_serves_the_same_bits(make_llm: Callable[..., GPTNeoXForCausalLM]) -> None:
    """The LLM runs on a stream of its own while the main one is kept busy, as by training."""
    llm = make_llm(0).cuda()

    def fill(chunk: int) -> Filled:
        indices = ORDER.chunk_rows(chunk)
        x = torch.empty(int(ROWS.usable(indices).sum()), 16, device="cuda")
        for forward in forwards(llm, ROWS, [HOOKPOINT], indices, {HOOKPOINT: x}):
            yield (forward.number + 1) * ROWS_PER_FORWARD / len(indices)
        return Batch({HOOKPOINT: x}, {})

    usual = [b.now[HOOKPOINT].clone() for b in ActivationStream(ORDER, fill)]
    busy = torch.randn(2048, 2048, device="cuda")
    ahead = []
    for batch in ActivationStream(ORDER, fill, ahead=True):
        busy = (busy @ busy).sin()
        ahead.append(batch.now[HOOKPOINT].clone())
    assert all(torch.equal(a, b) for a, b in zip(usual, ahead, strict=True))


def test_activations_are_served_in_float32_times_their_scale() -> None:
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0)).bfloat16()

    def fill(chunk: int) -> Filled:
        yield 1.0
        return Batch({"a": x, "b": x}, {"a": x})

    batch = next(iter(ActivationStream(ORDER, fill, lambda: {"a": 3.0})))
    at = ORDER.shuffle(0, 400)[:BATCH]
    assert torch.equal(batch.now["a"], 3 * x[at].float())
    assert torch.equal(batch.now["b"], x[at].float())
    assert torch.equal(batch.before["a"], x[at].float())


def test_a_chunk_is_freed_with_its_last_batch() -> None:
    """Lightning asks for no batch after a stage's last one, and measures the stage then."""
    chunks: list[weakref.ref[torch.Tensor]] = []

    def fill(chunk: int) -> Filled:
        x = positions(ORDER.chunk_rows(chunk))
        chunks.append(weakref.ref(x))
        yield 1.0
        return Batch({HOOKPOINT: x}, {})

    reading = iter(ActivationStream(ORDER, fill))
    for i in range(25):
        next(reading)
        is_last = i % 4 == 3 or i == 24
        assert (chunks[-1]() is None) == is_last


def test_what_was_before_is_at_the_same_positions() -> None:
    for batch in stream(ORDER):
        assert torch.equal(batch.before[HOOKPOINT], 2 * batch.now[HOOKPOINT])


def test_lanes_of_a_module_see_the_same_activations_in_an_order_of_their_own() -> None:
    def fill(chunk: int) -> Filled:
        x = positions(ORDER.chunk_rows(chunk))
        yield 1.0
        return Batch({"module@a": x, "module@b": x}, {"module@b": -x})

    got = list(ActivationStream(ORDER, fill))
    a, b = (
        torch.cat([batch.now[name] for batch in got[: ORDER.batches_per_chunk]]) for name in ("module@a", "module@b")
    )
    assert not torch.equal(got[0].now["module@a"], got[0].now["module@b"])
    assert len(np.intersect1d(a, b)) > 0.9 * len(a)  # the chunk's; a few fill no batch, and not the same ones
    assert all(torch.equal(batch.before["module@b"], -batch.now["module@b"]) for batch in got)
    assert torch.equal(got[0].now["module@a"], next(iter(stream(ORDER))).now[HOOKPOINT])  # the first is as if alone


def test_an_arm_sees_the_same_rows_in_another_order() -> None:
    arm = replace(ORDER, arm=1)
    assert not np.array_equal(arm.chunk_rows(0), ORDER.chunk_rows(0))
    assert len(np.intersect1d(rows_used(arm), rows_used(ORDER))) > 0.9 * len(rows_used(ORDER))


def test_the_position_counts_the_batch_in_use_and_starts_over_at_the_end() -> None:
    reading = stream(ORDER)
    assert reading.state_dict() == {"position": 0, "end": 25}
    for i, _ in enumerate(reading, start=1):
        assert reading.state_dict() == {"position": i, "end": 25}
    assert reading.state_dict() == {"position": 0, "end": 25}


@pytest.mark.parametrize("world_size", [1, 2], ids=["one process", "two processes"])
def test_a_corpus_that_is_just_long_enough_fills_every_batch(world_size: int) -> None:
    """At the least corpus that is accepted, no chunk may come out short."""
    for n in range(60, 140):
        rows = rows_with_bos(n, seed=n)
        orders = [
            StageOrder(rows, 640, BATCH, 100, seed=n, step=1, rank=r, world_size=world_size) for r in range(world_size)
        ]
        try:
            orders[0].chunk_rows(0)
        except ValueError:
            continue
        for order in orders:
            for chunk in range(order.chunks):
                need = min(order.batches_per_chunk, order.batches - chunk * order.batches_per_chunk) * order.local_batch
                assert rows.usable(order.chunk_rows(chunk)).sum() >= need
        return
    pytest.fail("no corpus was long enough")


def test_a_corpus_shorter_than_the_budget_says_so() -> None:
    order = replace(ORDER, tokens=64_000)
    with pytest.raises(ValueError, match=r"A stage needs [\d,]+ tokens \(64,000 .*holds \d,\d+\. ") as raised:
        order.chunk_rows(0)
    assert f"{int(ROWS.usable().sum()):,}" in str(raised.value)
    for key in ("data.corpus", "data.tokens.max_tokens", "scheduler.tokens_first", "scheduler.tokens_next"):
        assert f"`{key}`" in str(raised.value)


def test_a_budget_below_one_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"budget of 63 tokens, less than one batch of 64; raise `scheduler.tokens"):
        replace(ORDER, tokens=63)


def stream_without(order: StageOrder, over: dict[str, float], sinks: np.ndarray) -> ActivationStream:
    """Activations are their place in the corpus; those of ``sinks`` have a norm of their own, 1e6 times theirs."""

    def fill(chunk: int) -> Filled:
        x = positions(order.chunk_rows(chunk)).double() + 1
        x[torch.isin(x[:, 0].long() - 1, torch.from_numpy(sinks))] *= 1e6
        yield 1.0
        return Batch({HOOKPOINT: x, "other": -x}, {HOOKPOINT: 2 * x})

    return ActivationStream(order, fill, norm_limits=lambda: over)


SINKS = np.random.default_rng(5).permutation(400 * CONTEXT)[: 400 * CONTEXT // 20]


def test_outliers_are_never_served_and_every_batch_is_full() -> None:
    got = list(stream_without(ORDER, {HOOKPOINT: 1e5}, SINKS))
    assert {len(b.now[HOOKPOINT]) for b in got} == {BATCH}
    assert len(got) == ORDER.batches
    seen = torch.cat([b.now[HOOKPOINT] for b in got])[:, 0].long().numpy() - 1
    assert not np.isin(seen, SINKS).any()
    assert len(np.unique(seen)) > 0.95 * len(seen)  # a few are seen twice, where a chunk has no others left
    assert all(torch.equal(b.before[HOOKPOINT], 2 * b.now[HOOKPOINT]) for b in got)
    assert any((b.now["other"].abs() > 1e5).any() for b in got)  # it has no limit


def test_what_is_an_outlier_at_the_llm_checkpoint_before_is_not_served_either() -> None:
    def fill(chunk: int) -> Filled:
        x = positions(ORDER.chunk_rows(chunk)).double() + 1
        sink = torch.isin(x[:, 0].long() - 1, torch.from_numpy(SINKS))
        yield 1.0
        return Batch({HOOKPOINT: x, "other": x}, {HOOKPOINT: torch.where(sink[:, None], 1e6 * x, x), "other": x})

    stream = ActivationStream(ORDER, fill, norm_limits=lambda: {HOOKPOINT: 1e5}, limits_before={HOOKPOINT: 1e5})
    got = list(stream)
    assert {len(b.now[HOOKPOINT]) for b in got} == {BATCH}
    assert not np.isin(torch.cat([b.now[HOOKPOINT] for b in got])[:, 0].long().numpy() - 1, SINKS).any()
    assert all(torch.equal(b.before[HOOKPOINT], b.now[HOOKPOINT]) for b in got)
    assert np.isin(torch.cat([b.now["other"] for b in got])[:, 0].long().numpy() - 1, SINKS).any()


def test_without_outliers_the_limit_changes_nothing() -> None:
    free, limited = (list(stream_without(ORDER, over, np.array([]))) for over in ({}, {HOOKPOINT: 1e5}))
    assert all(torch.equal(a.now[HOOKPOINT], b.now[HOOKPOINT]) for a, b in zip(free, limited, strict=True))


def test_a_batch_without_outliers_is_reached_directly() -> None:
    expected = list(stream_without(ORDER, {HOOKPOINT: 1e5}, SINKS))[6:]
    direct = stream_without(ORDER, {HOOKPOINT: 1e5}, SINKS)
    direct.load_state_dict({"position": 6, "end": 25})
    assert all(torch.equal(a.now[HOOKPOINT], b.now[HOOKPOINT]) for a, b in zip(direct, expected, strict=True))


def test_a_chunk_of_outliers_alone_says_what_to_change() -> None:
    with pytest.raises(ValueError, match=r"All \d+ activations of .* in chunk 0 .*`data\.tokens\.outlier_norm`"):
        next(iter(stream_without(ORDER, {HOOKPOINT: 0.5}, SINKS)))


@pytest.mark.parametrize("n", [1, ROWS_PER_FORWARD, 2 * ROWS_PER_FORWARD + 3])
def test_harvest_gives_the_usable_activations_in_reading_order(
    make_llm: Callable[..., GPTNeoXForCausalLM], n: int
) -> None:
    llm, indices = make_llm(0), np.random.default_rng(1).permutation(len(ROWS.tokens))[:n]
    got = list(harvest(llm, LLMCheckpoint("m", None, 0), ROWS, [HOOKPOINT], indices))
    tokens = torch.from_numpy(ROWS.tokens[indices].astype(np.int64))
    assert torch.equal(torch.cat([t for t, _ in got]), tokens)
    x = read_activations(llm, tokens, [HOOKPOINT])[HOOKPOINT]
    by_hand = [x[r, c] for r in range(n) for c in range(CONTEXT) if tokens[r, c] != 0]
    torch.testing.assert_close(torch.cat([a[HOOKPOINT] for _, a in got]), torch.stack(by_hand), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_buffer_is_filled_with_what_a_harvest_gives(
    make_llm: Callable[..., GPTNeoXForCausalLM], dtype: torch.dtype
) -> None:
    llm, indices = make_llm(0).to(dtype), np.arange(2 * ROWS_PER_FORWARD + 3)
    harvested = harvest(llm, LLMCheckpoint("m", None, 0), ROWS, [HOOKPOINT], indices)
    expected = torch.cat([x[HOOKPOINT] for _, x in harvested])
    assert expected.dtype == torch.float32
    for kept in (dtype, torch.float32):
        buffer = torch.full_like(expected, torch.nan, dtype=kept)
        parts = [f.activations[HOOKPOINT] for f in forwards(llm, ROWS, [HOOKPOINT], indices, {HOOKPOINT: buffer})]
        assert torch.equal(buffer.float(), expected)
        assert parts[0].data_ptr() == buffer.data_ptr()  # views of it, no copies


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["NaN", "infinite"])
def test_activations_that_are_not_finite_name_the_llm_checkpoint_and_the_batch(
    make_llm: Callable[..., GPTNeoXForCausalLM], poison: float
) -> None:
    """Only token 60 is poisoned; it occurs in row 70 alone, which is in the third forward."""
    llm = make_llm(0)
    with torch.no_grad():
        llm.gpt_neox.embed_in.weight[60] = poison
    tokens = ROWS.tokens.copy()
    tokens[70, 5] = 60
    rows = replace(ROWS, tokens=tokens)
    checkpoint = LLMCheckpoint("the/llm", "step512", 512)
    reading = harvest(llm, checkpoint, rows, [HOOKPOINT], np.arange(100))
    next(reading)
    next(reading)
    with pytest.raises(ValueError, match="NaN or infinite activations in forward batch 2 ") as raised:
        next(reading)
    for part in (
        HOOKPOINT,
        "step 512",
        "the/llm",
        "step512",
        "token rows 64",
        "Leave this checkpoint out of `scheduler.steps`",
    ):
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)
