"""What the hub has: search, popular models, and all about one of them."""

import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from huggingface_hub import HfApi, ModelInfo, get_session
from huggingface_hub.file_download import hf_hub_download
from huggingface_hub.utils.tqdm import disable_progress_bars

from common.errors import InvalidValue
from router.hub import failures, fit
from router.hub.files import needed_files
from router.hub.fit import Drafters, Fit
from router.hub.ids import check_id, check_revision
from router.hub.query import Query, check_query
from router.hub.store import UNKNOWN, FileRecord, Store, quantization_of, read_origin

disable_progress_bars()

NAMESAKES = 5  # of a model that has a draft head: how many are looked at
TIMEOUT_S = 15.0
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_EXPAND = [
    "downloads",
    "likes",
    "lastModified",
    "library_name",
    "tags",
    "safetensors",
    "config",
    "gated",
    "pipeline_tag",
]


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A model on the hub."""

    id: str
    downloads: int
    likes: int
    updated: str | None
    library: str
    license: str | None
    size_bytes: int | None
    parameters: int | None
    quantization: str
    architecture: str
    gated: bool
    is_local: bool
    drafts: list[str]


class Details(msgspec.Struct, frozen=True, kw_only=True):
    """All about one model. `files` are those that would be downloaded."""

    id: str
    revision: str
    source: str
    architecture: str
    quantization: str
    license: str | None
    gated: bool
    size_bytes: int
    parameters: int | None
    context_tokens: int | None
    files: list[FileRecord]
    fit: Fit
    drafters: Drafters
    local_path: str | None


def search(query: Query, store: Store) -> list[Found]:
    """Models that fit the query, those for MLX first unless it wants all alike. Raises hub errors of ours."""
    check_query(query)
    choices: dict[str, list[str | None]] = {"mlx": ["mlx"], "any": [None], "mlx-first": ["mlx", None]}
    found: dict[str, Found] = {}
    for library in choices[query.library]:
        for model in _listed(query, library):
            if len(found) >= query.limit:
                break
            item = _found(model, store)
            if _is_small_enough(item, query.max_size_gb):
                found.setdefault(item.id, item)
    return list(found.values())


def popular(store: Store, limit: int = 20) -> list[Found]:
    """Models that a draft head on this machine drafts for, then the most downloaded MLX text models."""
    found = {model.id: model for model in search(Query(library="mlx", limit=limit), store)}
    for name in fit.drafted_models():
        found |= {model.id: model for model in search(Query(query=name, limit=NAMESAKES), store) if model.drafts}
    return sorted(found.values(), key=lambda model: not model.drafts)[:limit]


def info(model_id: str, store: Store, revision: str | None = None, memory_limit_gb: float = 0.0) -> Details:
    """A model in the store, if it is there and no revision is asked for; else one on the hub."""
    if revision is None and store.has(model_id):
        return _local_info(model_id, store, memory_limit_gb)
    return _hub_info(model_id, store, revision, memory_limit_gb)


def hub_model(model_id: str, revision: str | None) -> ModelInfo:
    """The hub's record of a model, with sizes and hashes of its files. Raises hub errors of ours."""
    check_id(model_id)
    if revision is not None:
        check_revision(revision)
    with failures.told(model_id, revision):
        api = HfApi(endpoint=failures.endpoint())
        return api.model_info(model_id, revision=revision, files_metadata=True, timeout=TIMEOUT_S)


def _hub_info(model_id: str, store: Store, revision: str | None, memory_limit_gb: float) -> Details:
    model = hub_model(model_id, revision)
    files = needed_files(model)
    config = _hub_config(model_id, model.sha or revision)
    weights = sum(file.size for file in files if file.name.endswith(".safetensors"))
    parameters = _parameters(model)
    served = fit.served_bytes(parameters, config, weights) if weights else None
    return Details(
        id=model.id,
        revision=model.sha or "",
        source="hub",
        architecture=str(config.get("model_type", UNKNOWN)),
        quantization=quantization_of(config),
        license=license_of(model.tags),
        gated=bool(model.gated),
        size_bytes=sum(file.size for file in files),
        parameters=fit.element_count(parameters, config) if parameters else None,
        context_tokens=_context(config),
        files=files,
        fit=fit.judge(config, served, memory_limit_gb),
        drafters=fit.drafters_of(model_id, config),
        local_path=str(store.folder(model_id)) if store.has(model_id) else None,
    )


def _local_info(name: str, store: Store, memory_limit_gb: float) -> Details:
    folder = store.find(name)
    model, origin = store.describe(folder), read_origin(folder)
    config: dict[str, Any] = msgspec.json.decode((folder / "config.json").read_bytes())
    files = [FileRecord(name=f.name, size=f.stat().st_size) for f in sorted(folder.iterdir()) if _is_model_file(f.name)]
    weights = sum(file.size for file in files if file.name.endswith(".safetensors"))
    parameters = fit.safetensors_elements(folder)
    return Details(
        id=name,
        revision=model.revision or "",
        source="local",
        architecture=model.architecture,
        quantization=model.quantization,
        license=origin.license if origin else None,
        gated=False,
        size_bytes=sum(file.size for file in files),
        parameters=fit.element_count(parameters, config) if parameters else None,
        context_tokens=_context(config),
        files=files,
        fit=fit.judge(config, fit.served_bytes(parameters, config, weights) if weights else None, memory_limit_gb),
        drafters=fit.drafters_of(name, config),
        local_path=str(folder),
    )


def _is_model_file(name: str) -> bool:
    return not name.startswith(".")


def _hub_config(model_id: str, revision: str | None) -> dict[str, Any]:
    with failures.told(model_id, revision), tempfile.TemporaryDirectory() as folder:
        path = hf_hub_download(
            model_id, "config.json", revision=revision, local_dir=folder, endpoint=failures.endpoint()
        )
        with open(path, "rb") as file:
            config = msgspec.json.decode(file.read())
    return config if isinstance(config, dict) else {}


def _listed(query: Query, library: str | None) -> Iterable[ModelInfo]:
    tags = [library] if library else []
    if query.license:
        tags.append(f"license:{query.license}")
    # More than wanted where some are left out afterwards.
    limit = query.limit * 5 if query.max_size_gb else query.limit
    with failures.told("the hub's list of models"):
        # Without a network the library's own retries would take half a minute to say so.
        get_session().head(failures.endpoint(), timeout=TIMEOUT_S)
        api = HfApi(endpoint=failures.endpoint())
        listed = api.list_models(
            search=query.query or None,
            filter=tags or None,
            pipeline_tag=None if query.task == "any" else query.task,
            sort=query.sort,  # type: ignore[arg-type]
            limit=limit,
            expand=_EXPAND,  # type: ignore[arg-type]
        )
        return list(listed)


def _found(model: ModelInfo, store: Store) -> Found:
    parameters, config = _parameters(model), model.config or {}
    name = model.id
    return Found(
        id=name,
        downloads=model.downloads or 0,
        likes=model.likes or 0,
        updated=model.last_modified.date().isoformat() if model.last_modified else None,
        library="mlx" if "mlx" in (model.tags or ()) else model.library_name or UNKNOWN,
        license=license_of(model.tags),
        size_bytes=fit.stored_bytes(parameters) or None,
        parameters=fit.element_count(parameters, config) or None,
        quantization=_form(config, parameters),
        architecture=str(config.get("model_type", UNKNOWN)),
        gated=bool(model.gated),
        is_local=_is_local(name, store),
        drafts=fit.trained_heads(name),
    )


def _is_local(name: str, store: Store) -> bool:
    try:
        return store.has(name)
    except InvalidValue:  # the hub has stranger names than the store
        return False


def _parameters(model: ModelInfo) -> Mapping[str, int]:
    return model.safetensors.parameters if model.safetensors else {}


def license_of(tags: Iterable[str] | None) -> str | None:
    """The licence that a model's tags name."""
    return next((tag.partition(":")[2] for tag in tags or () if tag.startswith("license:")), None)


def _form(config: dict[str, Any], parameters: Mapping[str, int]) -> str:
    """What the config says, else the type of most weights: the hub's lists have little of the config."""
    form = quantization_of(config)
    if form != UNKNOWN or not parameters:
        return form
    return FLOATS.get(max(parameters, key=lambda dtype: parameters[dtype]), UNKNOWN)


def _is_small_enough(model: Found, limit_gb: float | None) -> bool:
    return limit_gb is None or (model.size_bytes is not None and model.size_bytes <= limit_gb * 1e9)


def _context(config: Mapping[str, Any]) -> int | None:
    text = config.get("text_config") or config
    value = text.get("max_position_embeddings")
    return value if isinstance(value, int) else None
