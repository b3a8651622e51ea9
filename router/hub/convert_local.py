"""A checkpoint of this machine into the store, in another form."""

from pathlib import Path

from common.errors import Conflict, ModelNotFound
from router.hub.conversion import convert
from router.hub.ids import check_id, converted_name, looks_like_id
from router.hub.store import Origin, Store, now, read_origin, records_of
from router.hub.wishes import Progress, Tell


def convert_local(
    source: str, name: str | None, form: str | None, group_size: int | None, store: Store, tell: Tell
) -> Path:
    """Convert the folder (or model in the store) `source`; returns the new model's folder in the store.

    Raises `ModelNotFound`, `Conflict` when the name is taken, and what the conversion raises.
    """
    folder, base = _found(source, store)
    name = check_id(name or converted_name(base, form))
    if store.has(name):
        raise Conflict(f"{name} is in the store already; choose another --name, or mlxspec rm {name}")
    with store.making(name) as pending:
        made = pending / "converted"
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        store.check_space(size, name)
        tell(Progress(stage="converting"))
        convert(folder, made, form, group_size)
        origin = read_origin(folder)
        place = store.publish(
            made,
            name,
            Origin(
                id=origin.id if origin else base,
                revision=origin.revision if origin else "",
                files=records_of(made),
                form=form,
                license=origin.license if origin else None,
                downloaded_at=now(),
            ),
        )
        store.forget_pending(pending)
    return place


def _found(source: str, store: Store) -> tuple[Path, str]:
    """The folder that `source` means, and the name that it suggests."""
    folder = Path(source).expanduser()
    if (folder / "config.json").is_file():
        return folder.resolve(), folder.resolve().name
    if (looks_like_id(source) or "/" not in source) and store.has(source):
        return store.find(source), source
    if looks_like_id(source):
        raise ModelNotFound(
            f"{source} is not in {store.root}; to fetch it from Hugging Face: mlxspec download {source} --quantize FORM"
        )
    raise ModelNotFound(f"{source} is neither a folder with a config.json nor a name of `mlxspec list`")
