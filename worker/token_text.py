"""The text of single tokens, for those who ask for log-probabilities: exact bytes, even of a part of a character."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from common.messages import ChosenLogprob, TokenLogprob
from worker.sampling.logprobs import Logprob

_BROKEN = "\ufffd"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how SentencePiece names a single byte
_BLANK = "\u2581"  # how it writes one


class TokenTexts:
    """Texts of a tokenizer's tokens, each looked up once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, tuple[int, ...]]] = {}

    def chosen(self, token: int, logprob: Logprob, text_offset: int) -> ChosenLogprob:
        """A token of an answer, with what is known of it."""
        text, raw = self.of(token)
        return ChosenLogprob(
            token_id=token,
            text=text,
            logprob=logprob.logprob,
            raw=raw,
            text_offset=text_offset,
            top=tuple(self._alternative(*pair) for pair in logprob.top),
        )

    def of(self, token: int) -> tuple[str, tuple[int, ...]]:
        """A token's text, special ones by name, and its bytes if the text cannot hold them."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._look_up(token)
        return known

    def _alternative(self, token: int, logprob: float) -> TokenLogprob:
        text, raw = self.of(token)
        return TokenLogprob(token_id=token, text=text, logprob=logprob, raw=raw)

    def _look_up(self, token: int) -> tuple[str, tuple[int, ...]]:
        text: str = self._tokenizer.decode([token])
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):  # a row of the embedding that no token uses
            return text, ()
        if _BROKEN in text:
            return text, _bytes(piece)
        # Decoders take the blank off a first token; within a text it is there.
        return (f" {text}" if piece.startswith(_BLANK) and not text.startswith(" ") else text), ()


def _bytes(piece: str) -> tuple[int, ...]:
    """The bytes that a vocabulary's entry stands for; none where its alphabet is unknown."""
    if found := _BYTE_PIECE.fullmatch(piece):
        return (int(found[1], 16),)
    alphabet = _byte_alphabet()
    if any(character not in alphabet for character in piece):
        return ()
    return tuple(alphabet[character] for character in piece)


@cache
def _byte_alphabet() -> Mapping[str, int]:
    """The characters by which byte-level BPE (GPT-2) writes each byte: the printable ones as they are."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
