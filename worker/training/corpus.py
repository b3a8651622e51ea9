"""The text that a head is trained on: rows of equal length on disk, without duplicates, some of them held out."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worker.training.synthesis import ANSWER, USER, Written

Array = np.ndarray[Any, Any]
HELD_OUT_ROWS = 64  # at most; a twentieth of all rows
_COMPARED_TOKENS = 64  # rows that are alike up to so many that the model wrote are duplicates
SERVED = "served.npz"


def runs(marks: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """[start, end) of each run of true marks."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marks, [False]]).astype(np.int8))).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


class Corpus:
    """Rows of `length` tokens in parts `corpus-N.npz` of a folder; a part is the work of one round of writing.

    Served text is one part more.
    """

    def __init__(self, folder: Path, length: int) -> None:
        self._folder = folder
        self._length = length
        self._known: set[bytes] = set()
        self._tokens: list[Array] = []
        self._kinds: list[Array] = []
        self.rounds = 0
        self.has_served = self._load(folder / SERVED)
        self.served_rows = self.rows
        while self._load(self._part(self.rounds)):
            self.rounds += 1

    def add(self, written: Written) -> int:
        """Keep a round's rows that are new, padded or cut to the corpus's length; returns how many."""
        new = self._keep(written, self._part(self.rounds))
        self.rounds += 1
        return new

    def add_served(self, written: Written) -> int:
        """The same for served text, once."""
        self.has_served, self.served_rows = True, self._keep(written, self._folder / SERVED)
        return self.served_rows

    @property
    def rows(self) -> int:
        return sum(map(len, self._tokens))

    @property
    def written_tokens(self) -> int:
        """Tokens that the model wrote."""
        return int(sum((kinds > 0).sum() for kinds in self._kinds))

    def answers(self, least_tokens: int) -> list[Array]:
        """All answers of so many tokens or more, int32 each."""
        return [
            row[start:end].astype(np.int32)
            for tokens, kinds in zip(self._tokens, self._kinds, strict=True)
            for row, by in zip(tokens, kinds, strict=True)
            for start, end in runs(by == ANSWER)
            if end - start >= least_tokens
        ]

    def split(self) -> tuple[Written, Written]:
        """Rows to train on, and rows that were held out."""
        tokens, kinds = np.concatenate(self._tokens), np.concatenate(self._kinds)
        held = min(max(len(tokens) // 20, 1), HELD_OUT_ROWS)
        chosen = np.arange(held) * len(tokens) // held  # of all parts
        return (
            Written(np.delete(tokens, chosen, axis=0), np.delete(kinds, chosen, axis=0)),
            Written(tokens[chosen], kinds[chosen]),
        )

    def vocabulary(self, size: int, extra: Sequence[int] = ()) -> Array:
        """The `size` commonest tokens of answers, and `extra`, sorted; int32."""
        tokens, kinds = np.concatenate(self._tokens), np.concatenate(self._kinds)
        counts = np.bincount(tokens[kinds == ANSWER]).astype(np.float64)
        users = np.bincount(tokens[kinds == USER], minlength=len(counts))
        counts = np.pad(counts, (0, len(users) - len(counts))) + 0.1 * users
        counts[[token for token in extra if token < len(counts)]] = np.inf
        common = np.argsort(-counts, kind="stable")[:size]
        return np.sort(common[counts[common] > 0]).astype(np.int32)

    def _load(self, part: Path) -> bool:
        """Take up a part that is there."""
        if not part.is_file():
            return False
        with np.load(part) as stored:
            tokens, kinds = stored["tokens"], stored["kinds"]
        for row, by in zip(tokens, kinds, strict=True):
            self._is_new(row, by)
        self._tokens.append(tokens)
        self._kinds.append(kinds)
        return True

    def _keep(self, written: Written, part: Path) -> int:
        pairs = zip(written.tokens, written.kinds, strict=True)
        new = [i for i, (row, by) in enumerate(pairs) if self._is_new(row, by)]
        tokens, kinds = self._shaped(written.tokens[new]).astype(np.uint32), self._shaped(written.kinds[new])
        partial = self._folder / "partial.npz"
        np.savez_compressed(partial, tokens=tokens, kinds=kinds)
        os.replace(partial, part)
        self._tokens.append(tokens)
        self._kinds.append(kinds)
        return len(new)

    def _is_new(self, row: Array, by: Array) -> bool:
        written = int(np.argmax(by > 0))
        start = row[: written + _COMPARED_TOKENS].astype(np.uint32).tobytes()
        if start in self._known:
            return False
        self._known.add(start)
        return True

    def _shaped(self, rows: Array) -> Array:
        rows = rows[:, : self._length]
        return np.pad(rows, ((0, 0), (0, self._length - rows.shape[1])))

    def _part(self, number: int) -> Path:
        return self._folder / f"corpus-{number:04d}.npz"
