"""A build from its beginning to its report; one that was killed goes on where it was."""

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np

from common import paths
from common.errors import ConfigError
from worker import backend, kept_text, loader
from worker.heads import folder
from worker.heads.folder import Trained
from worker.heads.identity import identity
from worker.training import dialogue, given, plan, report
from worker.training.acceptance import count
from worker.training.corpus import Corpus
from worker.training.measure import DRAFT_TOKENS, Measured, longest_answers, measure
from worker.training.openers import PROMPTS
from worker.training.plan import Plan
from worker.training.reading import Reader
from worker.training.report import Report, Spent
from worker.training.synthesis import LEAST_TEXT, Writer
from worker.training.trainer import Progress, Told, Trainer

WORK = "work"  # folder of what only an unfinished build needs
Array = np.ndarray[Any, Any]
_MEASURED_TOKENS = 128  # of an answer
_JUDGED_BY = 4  # rows of text by which layers are chosen
_LEAST_WRITTEN = 16  # tokens of a conversation, beside its template's
Say = Callable[[str], None]


class BadBuild(ConfigError):
    """The build cannot go on like this."""


@dataclass(frozen=True, slots=True)
class Job:
    """`weights`: number format of the target, as in the configuration. `command`: what was typed, for the report.

    `prompts` are for measuring (none: built-in ones); `training_prompts` but those of them are answered for the text to
    train on, and `served` is the folder of the model's kept text.
    """

    model: str
    out: Path
    plan: Plan
    weights: str = "auto"
    prompts: Sequence[str] = ()
    training_prompts: Sequence[str] = ()
    served: Path | None = None
    command: str = ""
    keeps_work: bool = False


def build(job: Job, say: Say) -> Report:
    """Make the drafter in `job.out`. Raises `BadModel`, `BadBuild`, `NoLayers`."""
    work = job.out / WORK
    loaded = loader.load(job.model, _target_form(job.weights))
    loaded.model.freeze()
    talk = dialogue.of(loaded.tokenizer, loaded.config)
    job = replace(job, plan=plan.fitted(job.plan, loaded.model, loaded.weights_bytes, loaded.context_tokens))
    check_length(job.plan.length, talk, loaded.context_tokens)
    prompts = encoded(job.prompts, loaded.tokenizer, loaded.context_tokens)
    _begin_work(work, job.plan)
    say(f"{job.model}: {loaded.weights} on {backend.describe()}")
    say(f"{job.plan.rows} rows of {job.plan.length} tokens at a time, {job.plan.batch_rows} for a step of training")
    corpus = Corpus(work, job.plan.length)
    _take_served(job, corpus, loader.vocabulary_size(loaded.config, loaded.tokenizer), say)
    answered = _training_prompts(job, loaded.tokenizer, say)
    sizes = job.plan.rows, job.plan.length
    writer = Writer(loaded.model, talk, *sizes, job.plan.seed, answered, job.plan.long_share)
    writing_s, making_s = _write(writer, corpus, job.plan, work, say)
    if corpus.rows < 2:
        raise BadBuild("only one conversation was written, and one is held out to judge by: give more --rows")
    rows, held_out = corpus.split()
    vocabulary = corpus.vocabulary(job.plan.vocabulary, sorted(talk.ends))
    trained = _fresh(loaded, job.plan, vocabulary, held_out.tokens[:_JUDGED_BY])
    judged = [longest_answers(held_out)]

    def judge(trained: Trained) -> float:
        reader = Reader(loaded.model, trained)
        try:
            return count(trained, reader, judged, DRAFT_TOKENS)[0].accept_length
        finally:
            reader.close()

    trainer = Trainer(loaded.model, trained, job.plan, work / "state.safetensors", judge, lambda told: say(_line(told)))
    trainer.train(rows, max(job.plan.minutes * 60 * (1 - job.plan.writing_share), 1.0))
    folder.save(trained, job.out)
    began = time.monotonic()
    measured = measure(loaded.model, trained, prompts, held_out, talk.ends, _MEASURED_TOKENS)
    spent = _spent(writing_s, making_s, trainer.progress, time.monotonic() - began)
    made = _report(job, corpus, writer.prompts_begun(corpus.rounds), spent, trainer.progress, measured)
    made = msgspec.structs.replace(made, others=report.others(trained.config.target, job.out))
    report.save(made, job.out)
    if not job.keeps_work:
        shutil.rmtree(work)
    return made


def evaluate(entry: folder.Entry, model: str, weights: str, prompts: Sequence[str]) -> Report:
    """Measure a trained drafter again, on this machine and these prompts; from now on its report says whether it pays.

    Raises `BadModel`, `BadHead`, `WrongTarget`.
    """
    before = report.load(entry.folder)
    loaded = loader.load(model, _target_form(weights))
    talk = dialogue.of(loaded.tokenizer, loaded.config)
    own = identity(loaded.model, loaded.config)
    trained = folder.load_any(entry.folder, own, loaded.model, plan.compute_form())
    asked = encoded(prompts, loaded.tokenizer, loaded.context_tokens)
    measured = measure(loaded.model, trained, asked, None, talk.ends, _MEASURED_TOKENS)
    held_out = [one for one in before.measured.acceptance if one.text == "held-out"]
    measured = msgspec.structs.replace(measured, acceptance=[*held_out, *measured.acceptance])
    return msgspec.structs.replace(
        before,
        is_used=measured.pays,
        measured=measured,
        measured_on=backend.describe(),
        others=report.others(own, entry.folder),
    )


def _fresh(loaded: loader.Loaded, wanted: Plan, vocabulary: Array, text: Array) -> Trained:
    """What is to be trained; `text` [rows, length] tells which layers to keep, if it is layers."""
    if wanted.init == folder.LAYERS:
        return plan.fresh_layers(loaded.model, loaded.config, vocabulary, text, wanted)
    sizes = plan.head_config(loaded.model, loaded.config, wanted)
    return plan.fresh_head(loaded.model, sizes, vocabulary, wanted.seed)


def check_length(length: int, talk: dialogue.Dialogue, context_tokens: int) -> None:
    """Raises `BadBuild` where a conversation has no room for an answer, or the model none for the conversation."""
    least = len(talk.prefix) + len(talk.middle) + _LEAST_WRITTEN
    if not least <= length <= context_tokens:
        raise BadBuild(
            f"--length is {length}; for this model it must lie in [{least}, {context_tokens}]: from what its template "
            "takes up to its context"
        )


def _target_form(weights: str) -> str:
    """Gradients go through the vocabulary projection: it has to be of floats."""
    if weights != "auto":
        return weights
    return "float32" if backend.name() == "cpu" else "bfloat16"


def _begin_work(work: Path, wanted: Plan) -> None:
    """Raises `BadBuild` where an unfinished build had another plan."""
    paths.ensure_private_dir(work)  # it may come to hold kept text
    file = work / "plan.json"
    if not file.is_file():
        folder.write(file, msgspec.json.encode(wanted))
        return
    before = msgspec.json.decode(file.read_bytes(), type=Plan)
    if before != wanted:
        fields = msgspec.structs.asdict(wanted)
        changed = [name for name, value in msgspec.structs.asdict(before).items() if fields[name] != value]
        raise BadBuild(
            f"{work.parent} has an unfinished build with other settings ({', '.join(changed)}): repeat those, or begin "
            "anew with --restart"
        )


def encoded(texts: Sequence[str], tokenizer: Any, context_tokens: int) -> list[list[int]]:
    """Token ids of the prompts to measure with, built-in ones if there are none. Raises `BadBuild` for one too long."""
    prompts = [dialogue.prompt(tokenizer, text) for text in texts or PROMPTS]
    most = context_tokens - _MEASURED_TOKENS
    for number, prompt in enumerate(prompts, start=1):
        if texts and len(prompt) > most:
            raise BadBuild(
                f"prompt {number} of --prompts has {len(prompt)} tokens; this model's context leaves {most} beside an "
                f"answer of {_MEASURED_TOKENS}: shorten it or leave it out"
            )
    return prompts


def _take_served(job: Job, corpus: Corpus, vocabulary: int, say: Say) -> None:
    if job.served is not None and not corpus.has_served:
        new = corpus.add_served(given.served(kept_text.conversations(job.served), job.plan.length, vocabulary))
        say(f"served: {new} conversations from {job.served}")


def _training_prompts(job: Job, tokenizer: Any, say: Say) -> list[Sequence[int]]:
    """Token ids of the prompts to answer, without those that are measured with and those that are too long."""
    wanted = dict.fromkeys(text for text in job.training_prompts if text not in (job.prompts or PROMPTS))
    fitting = given.with_room((dialogue.prompt(tokenizer, text) for text in wanted), job.plan.length)
    if job.training_prompts:
        say(
            f"training prompts: {len(fitting)} of {len(job.training_prompts)}; the others are measured with, come "
            f"twice or leave an answer no room in {job.plan.length} tokens"
        )
    return fitting


def _write(writer: Writer, corpus: Corpus, plan: Plan, work: Path, say: Say) -> tuple[float, float]:
    """Rounds of writing until their time is over, an earlier build's included; at least one.

    Returns its seconds, and those of making kernels: rounds are equal work, so what the first ones take longer than
    usual is not of writing.
    """
    clock = work / "rounds_s.json"
    taken: list[float] = msgspec.json.decode(clock.read_bytes(), type=list[float]) if clock.is_file() else []
    budget_s = plan.minutes * 60 * plan.writing_share
    while not corpus.rounds or (
        _usual_s(taken, corpus.rounds + 0.5) < budget_s and not 0 < plan.tokens <= corpus.written_tokens
    ):
        began = time.monotonic()
        told = corpus.answers(LEAST_TEXT) if plan.long_share else ()
        new = corpus.add(writer.write(corpus.rounds, told))
        taken.append(time.monotonic() - began)
        folder.write(clock, msgspec.json.encode(taken))
        left_s = max(budget_s - _usual_s(taken, corpus.rounds), 0)
        say(
            f"writing: {corpus.written_tokens} tokens in {corpus.rows} rows, {new} new in {taken[-1]:.1f} s "
            f"({plan.rows * plan.length / taken[-1]:.0f} tokens/s), {left_s:.0f} s left"
        )
    mx.clear_cache()
    writing_s = min(_usual_s(taken, len(taken)), sum(taken))
    return writing_s, sum(taken) - writing_s


def _usual_s(taken: Sequence[float], rounds: float) -> float:
    """Seconds of so many rounds of writing, at the pace of half of those that were made."""
    return statistics.median_low(taken) * rounds if taken else 0.0


def _line(told: Told) -> str:
    agreement = " ".join(f"{share:.2f}" for share in told.agreement)
    left_s = max(told.left_s, 0)
    return f"training: {told.progress:4.0%}, {told.tokens} tokens, agreement {agreement}, {left_s:.0f} s left"


def _spent(writing_s: float, making_s: float, progress: Progress, measuring_s: float) -> Spent:
    return Spent(
        writing_s=round(writing_s, 1),
        making_s=round(making_s + progress.making_s, 1),
        reading_s=round(progress.reading_s, 1),
        passes_s=round(progress.train_s - progress.reading_s, 1),
        judging_s=round(progress.judging_s, 1),
        measuring_s=round(measuring_s, 1),
    )


def _report(job: Job, corpus: Corpus, answered: int, spent: Spent, progress: Progress, measured: Measured) -> Report:
    return Report(
        is_used=measured.pays,
        model=Path(job.model).name,
        device=backend.describe(),
        measured_on=backend.describe(),
        command=job.command,
        plan=job.plan,
        written_tokens=corpus.written_tokens,
        written_rows=corpus.rows,
        served_rows=corpus.served_rows,
        answered_prompts=answered,
        writing_s=spent.writing_s,
        train_s=round(progress.train_s, 1),
        train_tokens=progress.tokens,
        steps=progress.step,
        curve=progress.curve,
        spent=spent,
        measured=measured,
    )
