"""Token ids become text as they come: no split characters, and nothing after a stop string."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

_UNFINISHED = "\ufffd"  # what decoding half a character gives
Decode = Callable[[list[int]], str]


@dataclass(slots=True)
class Detokenizer:
    """Incremental decoding: text is held back while its last character is incomplete.

    Only a short window of tokens is decoded again for each new one; the window starts where text was last settled, so
    that decoders which treat a first token in a special way (a leading blank) do so once.
    """

    decode: Decode
    tokens: list[int] = field(default_factory=list)
    settled: int = 0  # tokens before the window
    read: int = 0  # tokens whose text is out

    def push(self, token: int) -> str:
        """The text that `token` completes; empty in mid-character."""
        self.tokens.append(token)
        before, now = self._window()
        if len(now) <= len(before) or now.endswith(_UNFINISHED):
            return ""
        self.settled, self.read = self.read, len(self.tokens)
        return now[len(before) :]

    def flush(self) -> str:
        """What is still held back, broken characters included."""
        before, now = self._window()
        self.settled = self.read = len(self.tokens)
        return now[len(before) :]

    def _window(self) -> tuple[str, str]:
        return self.decode(self.tokens[self.settled : self.read]), self.decode(self.tokens[self.settled :])


@dataclass(slots=True)
class TextStream:
    """The text of one request: detokenized, and cut at the first stop string, of which no part is ever sent."""

    detokenizer: Detokenizer
    stop: tuple[str, ...] = ()
    end_tokens: frozenset[int] = frozenset()
    held: str = ""  # might be the beginning of a stop string
    is_stopped: bool = False
    tokens: int = 0
    characters: int = 0  # of all tokens so far, sent or not

    def push(self, tokens: Sequence[int]) -> str:
        """Text that may be sent after these tokens. Once `is_stopped`, further tokens are ignored."""
        sent = ""
        for token in tokens:
            if self.is_stopped:
                break
            self.tokens += 1
            if token not in self.end_tokens:
                text = self.detokenizer.push(token)
                self.characters += len(text)
                sent += self._cut(text)
        return sent

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        if self.is_stopped:
            return ""
        sent = self._cut(self.detokenizer.flush())
        if not self.is_stopped:
            sent, self.held = sent + self.held, ""
        return sent

    def _cut(self, text: str) -> str:
        if not self.stop:
            return text
        text = self.held + text
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self.held = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self.stop)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
