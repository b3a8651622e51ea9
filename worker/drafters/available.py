"""Which drafters a model gets: the copying ones always, those that compute by configuration and trial."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from common.config import Config, ModelConfig, resolve_model_path
from common.logs import fields
from worker import calibration, loader, self_test
from worker.cache.ragged import UnsupportedCache
from worker.drafters import trial
from worker.drafters.chain import GREEDY, SAMPLED, ChainDrafter
from worker.drafters.drafter import Drafter
from worker.drafters.head import HeadDrafter
from worker.drafters.layers import HealedLayersDrafter, LayersDrafter
from worker.drafters.model import ModelDrafter
from worker.drafters.ngram import NgramDrafter
from worker.drafters.suffix import SuffixDrafter
from worker.drafters.trial import Trial
from worker.heads import folder
from worker.heads.identity import identity
from worker.heads.vocabulary import NoVocabulary, embedding
from worker.loader import BadModel, Loaded
from worker.step_times import StepTimes
from worker.taps import NoLayers
from worker.target import Target

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Available:
    """A model's drafters by name, and those of them that `auto` uses.

    `acceptance`: what to expect of those that compute, by match and position, from their reports or trials.
    """

    drafters: dict[str, Drafter] = field(default_factory=dict)
    in_auto: list[str] = field(default_factory=list)
    acceptance: dict[tuple[str, int], Sequence[float]] = field(default_factory=dict)

    def add(self, drafter: Drafter) -> None:
        self.drafters[drafter.name] = drafter
        self.in_auto.append(drafter.name)

    def add_tried(self, drafter: ChainDrafter, found: Trial, times: StepTimes) -> None:
        """A drafter that computes is used by `auto` only where it promises a gain."""
        self.drafters[drafter.name] = drafter
        greedy = drafter.acceptance.get(GREEDY) or (found.agreement,)
        self.acceptance[drafter.name, GREEDY] = greedy
        self.acceptance[drafter.name, SAMPLED] = drafter.acceptance.get(SAMPLED) or greedy
        if trial.is_promising(greedy, drafter.times.predict, times.predict):
            self.in_auto.append(drafter.name)


def load_head(loaded: Loaded, target: Target) -> HeadDrafter | None:
    """The trained head that was made for this model, if there is one; it follows the target from now on."""
    try:
        entry = folder.find(identity(loaded.model, loaded.config))
        if entry is None:
            return None
        dtype = embedding(loaded.model)(mx.zeros(1, mx.int32)).dtype
        head = folder.load(entry.folder, entry.config.target, loaded.model, dtype)
        drafter = HeadDrafter(target, head, StepTimes(), loader.vocabulary_size(loaded.config, loaded.tokenizer))
        drafter.acceptance = _expected(entry.verdict)
        return drafter
    except (folder.BadHead, NoLayers, NoVocabulary) as error:
        log.warning("The model's draft head is not used. %s", fields(reason=str(error)))
        return None


def load_layers(loaded: Loaded) -> HealedLayersDrafter | None:
    """The model's own layers as they were healed, if they were. To be called before anybody taps the model."""
    try:
        entry = folder.find(identity(loaded.model, loaded.config), folder.LAYERS)
        if entry is None:
            return None
        dtype = embedding(loaded.model)(mx.zeros(1, mx.int32)).dtype
        healed = folder.load_layers(entry.folder, entry.config.target, loaded.model, dtype)
        drafter = HealedLayersDrafter(healed, StepTimes(), loader.vocabulary_size(loaded.config, loaded.tokenizer))
        if not drafter.target.has_prefixes:
            raise folder.BadHead("the model keeps recurrent states, which a chain of drafted tokens cannot take back")
        drafter.acceptance = _expected(entry.verdict)
        return drafter
    except (folder.BadHead, NoLayers, NoVocabulary, UnsupportedCache) as error:
        log.warning("The model's healed layers are not used. %s", fields(reason=str(error)))
        return None


def _expected(verdict: folder.Verdict) -> dict[int, Sequence[float]]:
    return {GREEDY: verdict.acceptance(0.0), SAMPLED: verdict.acceptance(folder.SAMPLED_AT)}


def find(
    path: str,
    loaded: Loaded,
    target: Target,
    times: StepTimes,
    config: Config,
    model: ModelConfig,
    head: HeadDrafter | None = None,
    healed: HealedLayersDrafter | None = None,
) -> Available:
    """Make the model's drafters; those that compute are tried, once on each device. Trained ones are made already.

    Raises `BadModel` when a draft model that is configured for this model does not fit it.
    """
    available = Available()
    available.add(SuffixDrafter())
    available.drafters[NgramDrafter.name] = NgramDrafter(config.speculation.ngram_max_match)  # suffix does what it does
    text = loaded.tokenizer.encode(trial.TEXT)[: trial.MOST_TOKENS]
    if head is not None:
        found = _remembered(
            f"head|{path}|{fingerprint(head.head.fuse_proj.weight)}", loaded, lambda: trial.try_head(target, head, text)
        )
        head.times = found.times
        available.add_tried(head, found, times)
    if draft := _draft_model(loaded, config, model):
        name = f"{path}|{draft[0]}"
        drafter = draft[1]
        found = _remembered(f"model|{name}", loaded, lambda: trial.try_model(target, drafter, text))
        drafter.times = found.times
        available.add_tried(drafter, found, times)
    ratio = model.draft_layers_ratio or config.speculation.draft_layers_ratio
    if healed is not None:
        name = f"healed|{path}|{fingerprint(healed.healed.adapter)}"
        found = _remembered(name, loaded, lambda: trial.try_model(target, healed, text))
        healed.times = found.times
        available.add_tried(healed, found, times)
    elif config.speculation.auto_draft and ratio and target.has_prefixes:
        _add_layers(available, path, loaded, target, times, ratio, text)
    return available


def _add_layers(
    available: Available,
    path: str,
    loaded: Loaded,
    target: Target,
    times: StepTimes,
    ratio: float,
    text: Sequence[int],
) -> None:
    try:
        found = _remembered(f"layers|{path}|{ratio}", loaded, lambda: trial.try_layers(target, text, ratio))
    except NoLayers as error:
        log.info("No drafting with the model's own layers. %s", fields(model=path, reason=str(error)))
        return
    available.add_tried(LayersDrafter(target, found.times, found.kept), found, times)


def _draft_model(loaded: Loaded, config: Config, model: ModelConfig) -> tuple[str, ModelDrafter] | None:
    """The configured draft model, loaded and checked; one that is set for all models may not fit some of them."""
    path = model.draft_model or config.speculation.draft_model
    if not path:
        return None
    try:
        return path, _load_draft_model(resolve_model_path(path), loaded, model.weights or config.engine.weights)
    except (BadModel, UnsupportedCache, self_test.WrongLogits) as error:
        reason = f"draft model {path}: {error}"
        if model.draft_model:
            raise BadModel(reason) from error
        log.warning("The draft model is not used. %s", fields(reason=reason))
        return None


def _load_draft_model(path: str, loaded: Loaded, weights: str) -> ModelDrafter:
    draft = loader.load(path, weights)
    own, theirs = loaded.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
    if own != theirs:
        raise BadModel(
            f"its vocabulary ({len(theirs)} tokens) is not the model's ({len(own)} tokens): a draft model must share it"
        )
    reference = self_test.reference_logits(draft.model)
    target = Target(draft.model)
    if reason := self_test.check(target, reference):
        raise BadModel(f"it cannot roll back rejected tokens: {reason}")
    if not target.has_prefixes:
        raise BadModel("it keeps recurrent states, which a chain of drafted tokens cannot take back: choose another")
    return ModelDrafter(target, StepTimes(), loader.vocabulary_size(loaded.config, loaded.tokenizer))


def _remembered(what: str, loaded: Loaded, find_out: Callable[[], Trial]) -> Trial:
    """The trial of an earlier start, or a new one."""
    file = calibration.file(what, loaded.weights)
    found = trial.load(file)
    if found is None:
        found = find_out()
        if found.is_steady:
            trial.save(found, file)
    return found


def fingerprint(weight: mx.array) -> str:
    """Tells one training from another by a matrix of what it made."""
    return f"{float(mx.abs(weight.astype(mx.float32)).sum()):.6g}"
