"""Names of models on the hub and in the store, and the forms that weights can be brought into."""

import re

from common.errors import InvalidValue
from common.forms import FLOATS, FORMS, GROUP_SIZES, MXFP4_GROUP_SIZE, QUANTIZED_BITS

PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_ID = re.compile(rf"{PART}(?:/{PART})?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,127}")


def check_id(text: str) -> str:
    """`text` if it can be a model's id: NAME or OWNER/NAME. Raises `InvalidValue`.

    Nothing else gets to a path: no empty, hidden or dotted part, no third part, no other character.
    """
    if not _ID.fullmatch(text) or ".." in text or "--" in text:
        raise InvalidValue(
            f"{text[:128]!r} is no model id; it must look like OWNER/NAME, as on huggingface.co", param="id"
        )
    return text


def looks_like_id(text: str) -> bool:
    """Whether `text` could be OWNER/NAME."""
    return bool(_ID.fullmatch(text)) and text.count("/") == 1 and ".." not in text and "--" not in text


def check_revision(text: str) -> str:
    """`text` if it can be a branch, tag or commit. Raises `InvalidValue`."""
    if not _REVISION.fullmatch(text) or ".." in text:
        raise InvalidValue(f"revision is {text[:128]!r}; it must be a branch, a tag or a commit", param="revision")
    return text


def check_form(form: str | None, group_size: int | None) -> None:
    """Raise `InvalidValue` unless weights can be brought into this form."""
    if form is not None and form not in FORMS:
        raise InvalidValue(f"quantize is {form!r}; possible: {', '.join(FORMS)}", param="quantize")
    if group_size is None:
        return
    if form is None or form in FLOATS:
        raise InvalidValue("group_size needs a quantization: " + ", ".join(QUANTIZED_BITS), param="group_size")
    sizes = (MXFP4_GROUP_SIZE,) if form == "mxfp4" else GROUP_SIZES
    if group_size not in sizes:
        possible = ", ".join(map(str, sizes))
        raise InvalidValue(f"group_size is {group_size}; possible with {form}: {possible}", param="group_size")


def converted_name(model_id: str, form: str | None) -> str:
    """The name of a model in another form: beside the first, so that both can be kept."""
    return f"{model_id}-{form}" if form else model_id
