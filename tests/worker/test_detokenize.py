"""Text from tokens: whole characters, nothing of a stop string."""

from hypothesis import given
from hypothesis import strategies as st

from worker.detokenize import Detokenizer, TextStream


def decode_bytes(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def stream(*stop: str, end: int | None = None) -> TextStream:
    return TextStream(Detokenizer(decode_bytes), stop, frozenset() if end is None else frozenset({end}))


@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_pieces_are_whole_characters_and_add_up(text: str) -> None:
    detokenizer, pieces = Detokenizer(decode_bytes), []
    for byte in text.encode():
        pieces.append(detokenizer.push(byte))
    pieces.append(detokenizer.flush())
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_broken_character_comes_out_at_the_end() -> None:
    detokenizer = Detokenizer(decode_bytes)
    assert detokenizer.push("é".encode()[0]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_stops_before_the_stop_string_however_it_is_cut() -> None:
    one = stream("END")
    assert [one.push([b]) for b in b"ab E"] == ["a", "b", " ", ""]
    assert one.push([ord("N")]) == ""
    assert one.push([ord("D")]) == ""
    assert one.is_stopped
    assert one.tokens == 6
    assert one.push(list(b"more")) == ""
    assert one.finish() == ""


def test_a_beginning_of_a_stop_string_that_leads_nowhere_is_sent() -> None:
    one = stream("END")
    assert one.push(list(b"EN")) == ""
    assert one.push(list(b"TER")) == "ENTER"
    assert one.push(list(b"E")) == ""
    assert one.finish() == "E"


def test_the_earliest_of_several_stop_strings_counts() -> None:
    one = stream("zz", "b")
    assert one.push(list(b"abzz")) == "a"


def test_characters_count_the_whole_text_even_what_is_held_back() -> None:
    one = stream("END", end=0)
    assert one.push(list("né E".encode())) == "né "
    assert one.characters == 4
    one.push([0])
    assert one.characters == 4


def test_end_tokens_have_no_text() -> None:
    one = stream(end=0)
    assert one.push([97, 0]) == "a"
    assert one.tokens == 2


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3))
def test_cut_in_any_way_equals_cut_at_once(text: str, stop: list[str]) -> None:
    one = stream(*stop)
    sent = "".join(one.push([b]) for b in text.encode()) + one.finish()
    earliest = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stop)]
    if not earliest:
        assert sent == text
    else:
        head = text[: earliest[0]]
        assert sent == min((head[: head.find(s)] for s in stop if s in head), key=len)
