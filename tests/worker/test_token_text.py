"""Texts and bytes of single tokens, for tokenizers of both families."""

from typing import Any

import pytest

from worker.sampling.logprobs import Logprob
from worker.token_text import TokenTexts


class ByteLevel:
    """Pieces as byte-level BPE writes them: bytes in an alphabet of printable characters."""

    pieces = ("Paris", "ĠParis", "Ã©", "ĠðŁ", "¦", "Ċ", "<|end|>")
    raw = (b"Paris", b" Paris", "é".encode(), b" \xf0\x9f", b"\xa6", b"\n", b"<|end|>")

    def decode(self, tokens: list[int]) -> str:
        return b"".join(self.raw[token] for token in tokens if token < len(self.raw)).decode(errors="replace")

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return self.pieces[token] if token < len(self.pieces) else None


class SentencePiece:
    """Pieces with U+2581 for a blank and <0x..> for bytes; a text's first blank is taken off."""

    pieces = ("▁Paris", "is", "<0xC3>", "▁")

    def decode(self, tokens: list[int]) -> str:
        text = "".join("\ufffd" if piece.startswith("<") else piece for piece in (self.pieces[t] for t in tokens))
        return text.replace("▁", " ").removeprefix(" ")

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.pieces[token]


@pytest.mark.parametrize(
    ("tokenizer", "token", "text", "raw"),
    [
        (ByteLevel(), 0, "Paris", ()),
        (ByteLevel(), 1, " Paris", ()),
        (ByteLevel(), 2, "é", ()),
        (ByteLevel(), 3, " \ufffd", (0x20, 0xF0, 0x9F)),
        (ByteLevel(), 4, "\ufffd", (0xA6,)),
        (ByteLevel(), 5, "\n", ()),
        (ByteLevel(), 6, "<|end|>", ()),
        (ByteLevel(), 99, "", ()),
        (SentencePiece(), 0, " Paris", ()),
        (SentencePiece(), 1, "is", ()),
        (SentencePiece(), 2, "\ufffd", (0xC3,)),
        (SentencePiece(), 3, " ", ()),
    ],
)
def test_a_token_has_its_text_and_its_bytes_if_they_are_no_characters(
    tokenizer: Any, token: int, text: str, raw: tuple[int, ...]
) -> None:
    assert TokenTexts(tokenizer).of(token) == (text, raw)


def test_a_chosen_token_comes_with_its_alternatives_in_their_order() -> None:
    chosen = TokenTexts(ByteLevel()).chosen(1, Logprob(-0.5, ((4, -0.25), (1, -0.5))), 17)
    assert (chosen.token_id, chosen.text, chosen.logprob, chosen.text_offset) == (1, " Paris", -0.5, 17)
    assert [(t.token_id, t.text, t.raw, t.logprob) for t in chosen.top] == [
        (4, "\ufffd", (0xA6,), -0.25),
        (1, " Paris", (), -0.5),
    ]


def test_the_tokenizer_is_asked_once_for_each_token() -> None:
    class Counting(ByteLevel):
        asked = 0

        def decode(self, tokens: list[int]) -> str:
            Counting.asked += 1
            return super().decode(tokens)

    texts = TokenTexts(Counting())
    assert [texts.of(1) for _ in range(5)] == [(" Paris", ())] * 5
    assert Counting.asked == 1
