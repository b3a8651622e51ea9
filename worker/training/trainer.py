"""Trains a head, or healed layers, on a corpus.

What it knows is written down every minute and tenth: there a killed training goes on.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from worker import backend
from worker.heads.folder import Trained
from worker.training.loss import surrogate_loss
from worker.training.muon import Arrays, fresh_state, updated
from worker.training.plan import Plan, compute_form, rate_factor
from worker.training.reading import Reader
from worker.training.synthesis import Written

_WEIGHTS = np.array([0.0, 0.25, 1.0], dtype=np.float32)  # of a position by what wrote the token that it predicts
_CHECKPOINT_S = 60.0
_AHEAD = 2  # steps that are handed to the device before one is waited for


class Point(msgspec.Struct, frozen=True):
    """A point of the curve: accept length on held-out text after so many seconds and tokens."""

    train_s: float
    tokens: int
    accept_length: float


class Progress(msgspec.Struct):
    """How far a training has come. `readings_s`: seconds of the target's forward over a batch, timed now and then.

    `making_s`: of the first steps with so many passes, for which a device that never made any has kernels to make
    (minutes on CUDA). They are not part of `train_s`.
    """

    step: int = 0
    tokens: int = 0
    train_s: float = 0.0
    making_s: float = 0.0
    judging_s: float = 0.0
    readings_s: list[float] = msgspec.field(default_factory=list)
    curve: list[Point] = msgspec.field(default_factory=list)

    @property
    def reading_s(self) -> float:
        """Estimated part of `train_s` that the target's forwards took."""
        return min(fmean(self.readings_s) * self.step, self.train_s) if self.readings_s else 0.0


@dataclass(slots=True)
class Told:
    """What a step tells: agreement with the target in each pass, and the share of the training that is done."""

    progress: float
    agreement: list[float]
    tokens: int
    left_s: float


@dataclass(slots=True)
class Trainer:
    """`judge` gives the accept length on held-out text, `tell` is told of progress every few seconds."""

    target: nn.Module
    trained: Trained
    plan: Plan
    file: Path
    judge: Callable[[Trained], float]
    tell: Callable[[Told], None]
    parameters: Arrays = field(default_factory=dict)
    state: Arrays = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)

    def train(self, rows: Written, train_s: float) -> None:
        """Until the time is over, or the plan's steps are made; the drafter has the trained weights afterwards."""
        self._begin()
        reader = Reader(self.target, self.trained)
        matrix = self.trained.rows.matrix().astype(compute_form())
        mx.eval(matrix)
        reading = _compiled(lambda tokens: reader.read(tokens).arrays())
        steps = {p: _compiled(partial(self._step, reader, matrix, p)) for p in {p for _, p in self.plan.stages}}
        batches = self._batches(rows)
        made: set[int] = set()
        told_at = saved_at = time.monotonic()
        done = self._share_done(train_s)
        while done < 1.0:
            began = time.monotonic()
            factor = rate_factor(done, self.progress.step)
            rates = mx.array([self.plan.matrix_rate * factor, self.plan.vector_rate * factor])
            tokens, weights = next(batches)
            passes = self.plan.passes(done)
            step = steps[passes]
            self.parameters, self.state, agreement = step(self.parameters, self.state, tokens, weights, rates)
            mx.async_eval(self.parameters, self.state, agreement)
            self.progress.step += 1
            self.progress.tokens += tokens.size
            if self.progress.step % _AHEAD == 0 or passes not in made:
                mx.eval(agreement)
            now = time.monotonic()
            if passes in made:
                self.progress.train_s += now - began
            else:
                made.add(passes)
                self.progress.making_s += now - began
            done = self._share_done(train_s)
            if now - told_at > 5.0 or done >= 1.0:
                told_at = now
                left = train_s - self.progress.train_s
                self.tell(Told(done, [float(a) for a in agreement.tolist()], self.progress.tokens, left))
            is_judged = len(self.progress.curve) < int(done * 10)
            if is_judged:
                self._judge()
                self.progress.readings_s.append(_seconds(lambda tokens=tokens: reading(tokens)))  # type: ignore[misc]
            if is_judged or now - saved_at > _CHECKPOINT_S:
                saved_at = now
                self._save()
        reader.close()
        self._put(self.parameters)
        self._save()

    def _share_done(self, train_s: float) -> float:
        by_steps = self.progress.step / self.plan.steps if self.plan.steps else 0.0
        return max(self.progress.train_s / train_s, by_steps)

    def _judge(self) -> None:
        began = time.monotonic()
        self._put(self.parameters)
        length = self.judge(self.trained)
        self.progress.judging_s += time.monotonic() - began
        self.progress.curve.append(Point(round(self.progress.train_s, 1), self.progress.tokens, round(length, 3)))

    def _step(
        self,
        reader: Reader,
        matrix: mx.array,
        passes: int,
        parameters: Arrays,
        state: Arrays,
        tokens: mx.array,
        weights: mx.array,
        rates: mx.array,
    ) -> tuple[Arrays, Arrays, mx.array]:
        read = reader.read(tokens)

        def loss(parameters: Arrays) -> tuple[mx.array, mx.array]:
            self._put(parameters)
            return surrogate_loss(self.trained, matrix, read, weights, passes)

        (_, agreement), gradients = mx.value_and_grad(loss)(parameters)
        parameters, state = updated(parameters, gradients, state, rates[0], rates[1], compute_form())
        return parameters, state, agreement

    def _put(self, parameters: Arrays) -> None:
        form = compute_form()
        self.trained.update(tree_unflatten([(name, array.astype(form)) for name, array in parameters.items()]))

    def _batches(self, rows: Written) -> Iterator[tuple[mx.array, mx.array]]:
        """Tokens [batch, length] and weights [batch, length − 1], from the step on that is next: a function of it."""
        count, size = len(rows.tokens), min(self.plan.batch_rows, len(rows.tokens))
        by_epoch = count // size
        number = self.progress.step
        while True:
            epoch = number // by_epoch
            order = np.random.default_rng([self.plan.seed, epoch]).permutation(count)
            for batch in range(number % by_epoch, by_epoch):
                chosen = order[batch * size : (batch + 1) * size]
                weights = np.zeros((size, rows.tokens.shape[1] - 1), dtype=np.float32)
                weights[:, :-1] = _WEIGHTS[rows.kinds[chosen, 2:]]
                yield mx.array(rows.tokens[chosen].astype(np.int32)), mx.array(weights)
            number = (epoch + 1) * by_epoch

    def _begin(self) -> None:
        """Take up where an earlier training was stopped, or begin."""
        if not self.file.is_file():
            own = dict(tree_flatten(self.trained.trainable_parameters()))
            # Copies: what a compiled step is given must not be an array of the target, which it reads besides.
            self.parameters = {name: array.astype(mx.float32) * 1.0 for name, array in own.items()}
            self.state = fresh_state(self.parameters)
            mx.eval(self.parameters, self.state)
            return
        arrays, notes = load_checkpoint(self.file)
        self.progress = msgspec.json.decode(notes["progress"], type=Progress)
        self.parameters = {n.removeprefix("head."): a for n, a in arrays.items() if n.startswith("head.")}
        self.state = {n.removeprefix("state."): a for n, a in arrays.items() if n.startswith("state.")}

    def _save(self) -> None:
        arrays = {f"head.{n}": a for n, a in self.parameters.items()}
        arrays |= {f"state.{n}": a for n, a in self.state.items()}
        partial_file = self.file.with_name(f"partial-{self.file.name}")
        mx.save_safetensors(str(partial_file), arrays, {"progress": msgspec.json.encode(self.progress).decode()})
        os.replace(partial_file, self.file)


def _compiled(step: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled, but on a CPU, where making a step into machine code takes longer than hundreds of steps."""
    return step if backend.name() == "cpu" else mx.compile(step)


def _seconds(run: Callable[[], list[mx.array]]) -> float:
    """Of the second run: the first one may compile."""
    mx.eval(run())
    began = time.perf_counter()
    mx.eval(run())
    return time.perf_counter() - began


def load_checkpoint(file: Path) -> tuple[Arrays, dict[str, Any]]:
    """Arrays and notes of a checkpoint."""
    loaded = mx.load(str(file), return_metadata=True)
    assert isinstance(loaded, tuple) and isinstance(loaded[0], dict)
    return loaded[0], loaded[1]
