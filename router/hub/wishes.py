"""What can be wished for, and how it is told of: light, for those that only pass it on."""

from collections.abc import Callable

import msgspec

from router.hub.ids import check_form, check_id, check_revision, converted_name


class Wish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to download: a model of the hub at a revision (main), in another form if one is named."""

    id: str
    revision: str | None = None
    quantize: str | None = None
    group_size: int | None = None
    force: bool = False

    @property
    def name(self) -> str:
        """The name under which it will be in the store."""
        return converted_name(self.id, self.quantize)

    @property
    def command(self) -> str:
        """What to type for it."""
        options = {"revision": self.revision, "quantize": self.quantize, "group-size": self.group_size}
        return " ".join(["mlxspec download", self.id, *(f"--{key} {value}" for key, value in options.items() if value)])


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far it is. `stage`: looking, downloading, converting, ready."""

    stage: str
    done_bytes: int = 0
    total_bytes: int = 0


Tell = Callable[[Progress], None]


def check_wish(wish: Wish) -> None:
    """Raise `InvalidValue` for what can never be downloaded."""
    check_id(wish.id)
    if wish.revision is not None:
        check_revision(wish.revision)
    check_form(wish.quantize, wish.group_size)
    check_id(wish.name)
