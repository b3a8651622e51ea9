"""Where trained drafters are kept: a folder each with `config.json`, `weights.safetensors` and a report.

They are of two kinds: heads, and healed layers, whose weights are adapters.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import msgspec
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import dequantize_model

from common import paths
from common.errors import ConfigError
from worker.heads.head import Head, HeadConfig
from worker.heads.healed import HealedConfig, HealedLayers

HEAD, LAYERS = "head", "layers"  # kinds, by the names of the drafters that they are
CONFIG, WEIGHTS, REPORT = "config.json", "weights.safetensors", "report.json"
SHIPPED = paths.shipped_drafts_dir()
PROMPTS = "prompts"  # the text of a report's acceptance that stands for what users ask
SAMPLED_AT = 0.7  # the temperature of a report's acceptance that stands for all but greedy requests
_VOCABULARY = "vocabulary"
Trained = Head | HealedLayers


class BadHead(ConfigError):
    """A head's folder cannot be used, now or on a second try."""


class NoSuchHead(BadHead):
    """There is no head of this name."""

    code = "not_found"


class WrongTarget(BadHead):
    """The head was made for another model."""


class Acceptance(msgspec.Struct, frozen=True, kw_only=True):
    """What a report says of one kind of text. `by_position`: that a draft's token stands if those before it do."""

    text: str
    temperature: float
    by_position: tuple[float, ...]


class _Judged(msgspec.Struct, frozen=True):
    acceptance: tuple[Acceptance, ...] = ()


class Verdict(msgspec.Struct, frozen=True):
    """The part of a report that says whether the drafter is to be used, and what to expect of it."""

    is_used: bool = True
    measured: _Judged = _Judged()

    def acceptance(self, temperature: float) -> tuple[float, ...]:
        """On prompts at this temperature, by position; () where that was not measured."""
        fitting = (a for a in self.measured.acceptance if (a.text, a.temperature) == (PROMPTS, temperature))
        return next((a.by_position for a in fitting), ())


class _Kind(msgspec.Struct, frozen=True):
    kind: str = HEAD


_CONFIGS: dict[str, type[HeadConfig] | type[HealedConfig]] = {HEAD: HeadConfig, LAYERS: HealedConfig}


@dataclass(frozen=True, slots=True)
class Entry:
    """A trained drafter that is there. `verdict`: what its report says, or that of none: it is used."""

    name: str
    folder: Path
    config: HeadConfig | HealedConfig
    verdict: Verdict

    @property
    def is_used(self) -> bool:
        return self.verdict.is_used


def heads_dir() -> Path:
    """Trained drafters made on this machine."""
    return paths.drafts_dir()


def entries() -> list[Entry]:
    """All trained drafters, those made here before those shipped; folders that cannot be read are left out."""
    found = []
    for base in (heads_dir(), SHIPPED):
        for folder in sorted(base.glob("*/")) if base.is_dir() else []:
            try:
                found.append(Entry(folder.name, folder, read_config(folder), _verdict(folder)))
            except BadHead:
                continue
    return found


def find(target: str, kind: str = HEAD) -> Entry | None:
    """What to use for the target of this identity: the first one whose report does not advise against it."""
    fitting = (entry for entry in entries() if entry.config.target == target and entry.config.kind == kind)
    return next((entry for entry in fitting if entry.is_used), None)


def read_config(folder: Path) -> HeadConfig | HealedConfig:
    """Raises `BadHead`."""
    try:
        content = (folder / CONFIG).read_bytes()
        return msgspec.json.decode(content, type=_CONFIGS[msgspec.json.decode(content, type=_Kind).kind])
    except (OSError, msgspec.DecodeError, KeyError) as error:
        raise BadHead(f"{folder} is not a head's folder: {error}") from error


def load(folder: Path, target: str, model: nn.Module | None = None, dtype: mx.Dtype | None = None) -> Head:
    """The head for the target of this identity, bound to `model`, its floats as `dtype`.

    Raises `BadHead`, and `WrongTarget` where it was made for another one.
    """
    config = _config_for(target, folder)
    if not isinstance(config, HeadConfig):
        raise BadHead(f"{folder} has a drafter of the kind {config.kind}, not a head")
    try:
        weights = _weights(folder)
        head = Head(config, weights.pop(_VOCABULARY).astype(mx.int32))
        if config.bits:
            nn.quantize(head, config.group_size, config.bits)
        if dtype is not None:
            weights = {n: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a for n, a in weights.items()}
        head.load_weights(list(weights.items()))
        if config.bits and dtype is not None and dtype == mx.float32:  # a CPU is slow at all other forms
            head = dequantize_model(head)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise BadHead(f"the head in {folder} cannot be read: {error}") from error
    head.freeze()
    return head if model is None else head.bind(model)


def load_layers(folder: Path, target: str, model: nn.Module, dtype: mx.Dtype) -> HealedLayers:
    """The healed layers of `model`, which has this identity. Raises `BadHead`, `WrongTarget` and `NoLayers`."""
    config = _config_for(target, folder)
    if not isinstance(config, HealedConfig):
        raise BadHead(f"{folder} has a drafter of the kind {config.kind}, not healed layers")
    try:
        weights = _weights(folder)
        healed = HealedLayers(config, weights.pop(_VOCABULARY).astype(mx.int32), model)
    except (OSError, RuntimeError, KeyError) as error:
        raise BadHead(f"the healed layers in {folder} cannot be read: {error}") from error
    own = {name: array.shape for name, array in healed.adapters().items()}
    if own != {name: array.shape for name, array in weights.items()}:
        raise BadHead(f"the adapters in {folder} do not fit the model's layers {config.kept}: make them anew")
    healed.update(tree_unflatten([(name, array.astype(dtype)) for name, array in weights.items()]))
    healed.freeze()
    return healed


def load_any(folder: Path, target: str, model: nn.Module, dtype: mx.Dtype) -> Trained:
    """A trained drafter of either kind. Raises what `load` and `load_layers` do."""
    is_head = read_config(folder).kind == HEAD
    return load(folder, target, model, dtype) if is_head else load_layers(folder, target, model, dtype)


def _config_for(target: str, folder: Path) -> HeadConfig | HealedConfig:
    config = read_config(folder)
    if config.target != target:
        raise WrongTarget(
            f"the {config.kind} in {folder} was made for another model (identity {config.target[:12]}, this model's is "
            f"{target[:12]}): make one for this model with mlxspec draft build"
        )
    return config


def _weights(folder: Path) -> dict[str, mx.array]:
    weights = mx.load(str(folder / WEIGHTS))
    assert isinstance(weights, dict)
    return weights


def save(trained: Trained, folder: Path) -> None:
    """Write it; a reader sees the one before or this one, whole. Other files in the folder stay."""
    folder.mkdir(parents=True, exist_ok=True)
    own = trained.adapters() if isinstance(trained, HealedLayers) else dict(tree_flatten(trained.parameters()))
    weights = own | {_VOCABULARY: trained.vocabulary.astype(mx.uint32)}
    partial = folder / f"partial-{WEIGHTS}"  # MLX adds the suffix itself where it is missing
    mx.save_safetensors(str(partial), weights)
    os.replace(partial, folder / WEIGHTS)
    write(folder / CONFIG, msgspec.json.format(msgspec.json.encode(trained.config), indent=2))


def write(file: Path, content: bytes) -> None:
    """Write a file at once or not at all."""
    partial = file.with_name(f"partial-{file.name}")
    partial.write_bytes(content)
    os.replace(partial, file)


def remove(entry: Entry) -> None:
    """Delete a head made here. Raises `BadHead` for a shipped one."""
    if entry.folder.parent == SHIPPED:
        raise BadHead(f"{entry.name} is shipped with mlxspec; to go without it, set the drafter to one of the others")
    shutil.rmtree(entry.folder)


def _verdict(folder: Path) -> Verdict:
    try:
        return msgspec.json.decode((folder / REPORT).read_bytes(), type=Verdict)
    except FileNotFoundError:
        return Verdict()
    except (OSError, msgspec.DecodeError) as error:
        raise BadHead(f"{folder / REPORT} cannot be read: {error}") from error
