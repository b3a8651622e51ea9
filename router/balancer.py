"""Which worker gets the next request (pure): the one that is done with it first, as far as one can tell."""

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping

from common.messages import ChatPrompt, Prompt, TextPrompt, TokenPrompt

CHARS_PER_TOKEN = 4  # a guess, for prompts that no worker has tokenized yet
BLOCK_CHARS = 512
BLOCK_TOKENS = BLOCK_CHARS // CHARS_PER_TOKEN
MAX_BLOCKS = 64  # of a prompt; what comes after them is not remembered
MAX_REMEMBERED = 16_384


def pick(outstanding_tokens: Mapping[str, int], known_tokens: Mapping[str, int] | None = None) -> str | None:
    """The worker with the fewest tokens before this request is done; ties go to the first name.

    `outstanding_tokens` are those that each still owes, `known_tokens` those of this prompt that it has read before.
    """
    known = known_tokens or {}
    return min(outstanding_tokens, key=lambda w: (outstanding_tokens[w] - known.get(w, 0), w), default=None)


class PrefixMemory:
    """Remembers which worker has read which beginnings of prompts, the latest of them, by blocks of characters."""

    def __init__(self) -> None:
        self._readers: OrderedDict[bytes, str] = OrderedDict()  # digest of a beginning -> the worker that read it last

    def remember(self, prompt: Prompt, worker: str) -> None:
        for digest in _beginnings(prompt):
            self._readers[digest] = worker
            self._readers.move_to_end(digest)
        while len(self._readers) > MAX_REMEMBERED:
            self._readers.popitem(last=False)

    def known_tokens(self, prompt: Prompt, workers: Collection[str]) -> dict[str, int]:
        """About how many of the prompt's first tokens each of `workers` has read before."""
        known: dict[str, int] = {}
        for number, digest in enumerate(_beginnings(prompt), start=1):
            reader = self._readers.get(digest)
            if reader is None:
                break
            if reader in workers:
                known[reader] = number * BLOCK_TOKENS
        return known


def _beginnings(prompt: Prompt) -> Iterator[bytes]:
    """Digests of the prompt's first block, its first two, …"""
    text = _text(prompt)
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, min(len(text), MAX_BLOCKS * BLOCK_CHARS) - BLOCK_CHARS + 1, BLOCK_CHARS):
        digest.update(text[start : start + BLOCK_CHARS].encode(errors="surrogatepass"))
        yield digest.digest()


def _text(prompt: Prompt) -> str:
    match prompt:
        case ChatPrompt(messages=messages):
            return "\0".join(f"{message.role}\0{message.content}" for message in messages)
        case TextPrompt(text=text):
            return text
        case TokenPrompt(token_ids=token_ids):
            return "".join(f"{token_id:4}" for token_id in token_ids[: MAX_BLOCKS * BLOCK_TOKENS])
