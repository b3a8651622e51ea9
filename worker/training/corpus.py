"""The text that a head is trained on: rows of equal length on disk, without duplicates, some of them held out."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worker.training.synthesis import ANSWER, USER, Written

Array = np.ndarray[Any, Any]
HELD_OUT_ROWS = 64  # at most; a twentieth of all rows
_COMPARED_TOKENS = 96  # rows that begin alike are duplicates


class Corpus:
    """Rows of `length` tokens in parts `corpus-N.npz` of a folder; a part is the work of one round of writing."""

    def __init__(self, folder: Path, length: int) -> None:
        self._folder = folder
        self._length = length
        self._known: set[bytes] = set()
        self._tokens: list[Array] = []
        self._kinds: list[Array] = []
        self.rounds = 0
        while (part := self._part(self.rounds)).is_file():
            with np.load(part) as stored:
                self._take(stored["tokens"], stored["kinds"])
            self.rounds += 1

    def add(self, written: Written) -> int:
        """Keep a round's rows that are new, padded or cut to the corpus's length; returns how many."""
        new = [i for i, row in enumerate(written.tokens) if self._is_new(row)]
        tokens, kinds = self._shaped(written.tokens[new]), self._shaped(written.kinds[new])
        partial = self._folder / "partial.npz"
        np.savez_compressed(partial, tokens=tokens.astype(np.uint32), kinds=kinds)
        os.replace(partial, self._part(self.rounds))
        self._tokens.append(tokens.astype(np.uint32))
        self._kinds.append(kinds)
        self.rounds += 1
        return len(new)

    @property
    def rows(self) -> int:
        return sum(map(len, self._tokens))

    @property
    def written_tokens(self) -> int:
        """Tokens that the model wrote."""
        return int(sum((kinds > 0).sum() for kinds in self._kinds))

    def split(self) -> tuple[Written, Written]:
        """Rows to train on, and rows that were held out."""
        tokens, kinds = np.concatenate(self._tokens), np.concatenate(self._kinds)
        held = min(max(len(tokens) // 20, 1), HELD_OUT_ROWS)
        return Written(tokens[held:], kinds[held:]), Written(tokens[:held], kinds[:held])

    def vocabulary(self, size: int, extra: Sequence[int] = ()) -> Array:
        """The `size` commonest tokens of answers, and `extra`, sorted; int32."""
        tokens, kinds = np.concatenate(self._tokens), np.concatenate(self._kinds)
        counts = np.bincount(tokens[kinds == ANSWER]).astype(np.float64)
        users = np.bincount(tokens[kinds == USER], minlength=len(counts))
        counts = np.pad(counts, (0, len(users) - len(counts))) + 0.1 * users
        counts[[token for token in extra if token < len(counts)]] = np.inf
        common = np.argsort(-counts, kind="stable")[:size]
        return np.sort(common[counts[common] > 0]).astype(np.int32)

    def _take(self, tokens: Array, kinds: Array) -> None:
        for row in tokens:
            self._is_new(row)
        self._tokens.append(tokens)
        self._kinds.append(kinds)

    def _is_new(self, row: Array) -> bool:
        start = row[:_COMPARED_TOKENS].astype(np.uint32).tobytes()
        if start in self._known:
            return False
        self._known.add(start)
        return True

    def _shaped(self, rows: Array) -> Array:
        rows = rows[:, : self._length]
        return np.pad(rows, ((0, 0), (0, self._length - rows.shape[1])))

    def _part(self, number: int) -> Path:
        return self._folder / f"corpus-{number:04d}.npz"
