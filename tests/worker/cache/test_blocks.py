"""How a packed step is taken apart for mixers."""

from worker.cache.blocks import attention_blocks, recurrent_blocks, token_order
from worker.cache.layout import Segment

STEP = (Segment(0, 5, 3), Segment(1, 9, 1, True), Segment(2, 4, 3), Segment(4, 0, 3, True), Segment(5, 7, 3, True))


def test_recurrent_rows_of_one_block_have_one_width_and_one_past() -> None:
    blocks = recurrent_blocks(STEP)
    assert [[s.slot for s in block.segments] for block in blocks] == [[0, 2], [1], [4], [5]]
    assert [block.is_fresh for block in blocks] == [False, False, True, False]
    assert [block.stands for block in blocks] == [False, True, True, True]
    assert blocks[0].tokens == (0, 1, 2, 4, 5, 6)


def test_drafts_attend_as_rows_of_one_token_and_prompts_as_chunks() -> None:
    singles, chunks = attention_blocks(STEP)
    assert [(s.slot, s.start, s.width) for s in singles.segments] == [
        (0, 5, 1),
        (0, 6, 1),
        (0, 7, 1),
        (1, 9, 1),
        (2, 4, 1),
        (2, 5, 1),
        (2, 6, 1),
    ]
    assert [s.slot for s in chunks.segments] == [4, 5]


def test_blocks_by_extent_write_a_rows_keys_before_the_queries_that_see_them() -> None:
    blocks = attention_blocks([Segment(0, 40, 1, True), Segment(1, 30, 4)], extent_step=32)
    assert [block.extent(32) for block in blocks] == [32, 64]
    assert [(s.slot, s.start) for s in blocks[0].segments] == [(1, 30), (1, 31)]


def test_token_order_leads_back_from_the_blocks_to_the_step() -> None:
    blocks = recurrent_blocks(STEP)
    outputs = [token for block in blocks for token in block.tokens]
    order = token_order(blocks)
    assert order is not None
    assert [outputs[place] for place in order] == list(range(len(outputs)))
    assert token_order(recurrent_blocks(STEP[:1])) is None


def test_neighbours_are_known_without_a_gather() -> None:
    pair, lone = recurrent_blocks([Segment(3, 1, 2), Segment(4, 8, 2), Segment(6, 2, 1)])
    assert (pair.first_token, pair.first_slot) == (0, 3)
    assert (lone.first_token, lone.first_slot) == (4, 6)
    scattered = recurrent_blocks(STEP)[0]
    assert (scattered.first_token, scattered.first_slot) == (None, None)
