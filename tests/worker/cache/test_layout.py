"""Grouping and indexing of packed steps."""

from hypothesis import given
from hypothesis import strategies as st

from worker.cache.layout import AttentionStyle, Group, Segment, group_segments, round_up

STYLE = AttentionStyle(extent_step=32, group_overhead=800, folds_heads=True)
GPU_LIKE = AttentionStyle(extent_step=256, group_overhead=65_536, folds_heads=False, doubles_shapes=True)


@st.composite
def segments(draw: st.DrawFn) -> list[Segment]:
    slots = sorted(draw(st.sets(st.integers(0, 20), min_size=1, max_size=10)))
    return [Segment(slot, draw(st.integers(0, 500)), draw(st.integers(1, 40))) for slot in slots]


@given(segments(), st.sampled_from([0, 800, 10**9]))
def test_groups_cover_all_segments_once_and_in_order(parts: list[Segment], overhead: int) -> None:
    style = AttentionStyle(32, overhead, True)
    groups = group_segments(parts, style)
    assert [s for group in groups for s in group.segments] == parts
    first = 0
    for group in groups:
        assert group.first_token == first
        first += group.tokens


@given(segments(), st.sampled_from([STYLE, GPU_LIKE]))
def test_gather_and_scatter_undo_each_other(parts: list[Segment], style: AttentionStyle) -> None:
    for group in group_segments(parts, style, 21):
        gathered = group.gather_index()
        assert [gathered[at] for at in group.scatter_index()] == list(
            range(group.first_token, group.first_token + group.tokens)
        )
        assert len(gathered) == group.slots * group.width


@given(segments())
def test_extents_hold_every_token_and_are_whole_steps(parts: list[Segment]) -> None:
    for group in group_segments(parts, STYLE):
        assert group.extent % STYLE.extent_step == 0
        assert all(segment.end <= group.extent for segment in group.segments)


def test_no_overhead_leaves_rows_apart_and_much_joins_them() -> None:
    parts = [Segment(0, 10, 1), Segment(1, 300, 1), Segment(2, 40, 3)]
    assert len(group_segments(parts, AttentionStyle(32, -1, True))) == 3
    assert len(group_segments(parts, AttentionStyle(32, 10**9, True))) == 1


def test_rows_of_like_length_attend_together_and_a_prompt_apart() -> None:
    parts = [Segment(0, 100, 1), Segment(1, 110, 1), Segment(2, 0, 200)]
    assert [len(group.segments) for group in group_segments(parts, STYLE)] == [2, 1]


def test_a_slot_without_tokens_sees_nothing() -> None:
    (group,) = group_segments([Segment(0, 5, 1), Segment(2, 5, 1)], AttentionStyle(32, 10**9, True))
    assert group.slots == 3
    assert group.starts()[1] + group.width <= 0


def test_round_up() -> None:
    assert [round_up(n, 32) for n in (0, 1, 32, 33)] == [0, 32, 32, 64]


def cost(groups: list[Group], style: AttentionStyle) -> int:
    return sum(g.slots * g.width * g.extent + style.group_overhead for g in groups)


@given(segments(), st.sampled_from([800, 5000, 100_000]))
def test_grouping_costs_no_more_than_all_apart_or_all_together(parts: list[Segment], overhead: int) -> None:
    style = AttentionStyle(32, overhead, True)
    chosen = cost(group_segments(parts, style), style)
    assert chosen <= cost(group_segments(parts, AttentionStyle(32, -(10**9), True)), style)
    if overhead == 100_000:
        assert chosen <= cost(group_segments(parts, AttentionStyle(32, 10**9, True)), style) * 1.5


@given(segments())
def test_shapes_are_rounded_to_few_and_stay_within_the_pool(parts: list[Segment]) -> None:
    pool = parts[-1].slot + 3
    for group in group_segments(parts, GPU_LIKE, pool):
        assert group.width in {2**i for i in range(7)}
        assert group.slots == pool or group.slots in {2**i for i in range(6)}
        assert 0 <= group.first_slot <= group.segments[0].slot
        assert group.segments[-1].slot < group.first_slot + group.slots <= pool
        assert len(group.starts()) == group.slots
