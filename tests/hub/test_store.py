"""The store: what it lists, verifies and deletes, and that no name leads out of it."""

import json
from pathlib import Path

import msgspec
import pytest

from common.config import Config, discover_models
from common.errors import Forbidden, MlxspecError, ModelNotFound
from router.hub.files import is_needed
from router.hub.ids import check_form, check_id, check_revision
from router.hub.store import PENDING, PLAN_FILE, FileRecord, Origin, Plan, Store
from router.hub.wishes import Wish, check_wish

TRICKS = [
    "",
    ".",
    "..",
    "/",
    "/etc",
    "/etc/passwd",
    "../x",
    "a/..",
    "a/../b",
    "../../etc/passwd",
    "a/../../b",
    "a/b/c",
    "a//b",
    "a/",
    "./a",
    ".hidden",
    "a/.hidden",
    ".pending",
    ".pending/a",
    "~",
    "~/models",
    "a\\..\\b",
    "%2e%2e/x",
    "..%2fx",
    "a%2f..%2fb",
    "a\0b",
    "a\nb",
    "a b",
    "a:b",
    "C:/x",
    "file:///etc",
    "a--b/c",
    "a..b/c",
    "a/b.",
    "a/-b",
    "а/b",  # a Cyrillic letter
    "a/b?x=1",
    "a/b#x",
    "a" * 97,
    "a/" + "b" * 200,
]


@pytest.mark.parametrize("name", TRICKS)
def test_no_trick_with_a_name_leaves_the_store(name: str, store: Store) -> None:
    for use in (check_id, store.folder, store.pending, store.find, store.has, store.delete, store.verify):
        with pytest.raises(MlxspecError):
            use(name)
    with pytest.raises(MlxspecError):
        check_wish(Wish(id=name))


@pytest.mark.parametrize("name", ["a", "a/b", "mlx-community/Qwen3-0.6B-4bit", "A_b.c/d-e_f.1", "gpt2"])
def test_ordinary_names_stay_inside(name: str, store: Store) -> None:
    assert store.folder(name).is_relative_to(store.root)
    assert store.pending(name).is_relative_to(store.root / ".pending")


@pytest.mark.parametrize("revision", ["..", "../x", "a/../b", "", "/x", "a b", "a\0", "-x"])
def test_tricks_with_revisions_are_refused(revision: str) -> None:
    with pytest.raises(MlxspecError, match="revision"):
        check_revision(revision)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "a/model.safetensors",
        "/config.json",
        "model..safetensors",
        "x.py",
        "config.json\n",
        ".env",
    ],
)
def test_files_with_odd_names_are_never_taken(name: str) -> None:
    assert not is_needed(name)


def put(folder: Path, origin: Origin | None = None, **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def test_links_are_not_followed_out_of_the_store(store: Store, tmp_path: Path) -> None:
    outside = put(tmp_path / "owner" / "model")
    store.root.mkdir()
    (store.root / "linked-owner").symlink_to(tmp_path / "owner")
    with pytest.raises(Forbidden, match="leads out of"):
        store.delete("linked-owner/model")
    (store.root / "linked").symlink_to(outside)
    store.delete("linked")
    assert not (store.root / "linked").exists()
    assert (outside / "config.json").is_file()
    inner = put(store.root / "acme" / "mine")
    (inner / "data").symlink_to(outside)
    store.delete("acme/mine")
    assert (outside / "config.json").is_file()
    assert not (store.root / "acme").exists()


def test_models_are_listed_by_name_and_known_to_the_server(store: Store) -> None:
    put(store.root / "plain", torch_dtype="bfloat16")
    put(store.root / "acme" / "tiny", quantization={"bits": 4, "group_size": 64})
    put(store.root / ".pending" / "acme--half" / "files")
    put(store.root / "acme" / ".hidden")
    models = store.models()
    assert [(m.name, m.quantization, m.origin) for m in models] == [
        ("acme/tiny", "4-bit", None),
        ("plain", "bfloat16", None),
    ]
    assert set(discover_models(Config())) == {"acme/tiny", "plain"}
    stats = store.stats()
    assert (stats.models, [p.name for p in stats.pending]) == (2, ["acme/half"])
    assert stats.free_bytes > 0


def test_verify_names_what_differs(store: Store, tmp_path: Path) -> None:
    made = put(tmp_path / "made")
    (made / "a.txt").write_text("right")
    (made / "b.txt").write_text("right")
    right = "4a0b7b8e3e5a5e7fd1ea7d2a4b2c4d2b1a2a6d34"
    files = [
        FileRecord(name="config.json", size=1),
        FileRecord(name="a.txt", size=5, blob_id=right),
        FileRecord(name="b.txt", size=5, sha256="0" * 64),
        FileRecord(name="c.txt", size=5),
    ]
    store.publish(made, "acme/x", Origin(id="acme/x", revision="r", files=files))
    found = {problem.file: problem.problem for problem in store.verify("acme/x")}
    assert found == {
        "config.json": "has 23 bytes instead of 1",
        "a.txt": "has another git hash",
        "b.txt": "has another sha256",
        "c.txt": "is missing",
    }


def test_what_was_cut_off_says_how_it_goes_on(store: Store) -> None:
    wish = Wish(id="acme/x", revision="v1", quantize="q4", group_size=32)
    with store.making(wish.name) as folder:
        (folder / PLAN_FILE).write_bytes(msgspec.json.encode(Plan(wish=wish, revision="c0ffee")))
        assert store.unfinished()[0].is_active
    with store.making("converted") as folder:
        (folder / "some.safetensors").write_text("cut off")
    found = {pending.name: pending for pending in store.unfinished()}
    assert not found["acme/x-q4"].is_active
    assert found["acme/x-q4"].wish == wish
    assert wish.command == "mlxspec download acme/x --revision v1 --quantize q4 --group-size 32"
    assert found["converted"].wish is None


def test_nothing_is_left_of_what_failed_before_it_began(store: Store) -> None:
    with pytest.raises(ModelNotFound), store.making("acme/x"):
        raise ModelNotFound("no such model")
    assert store.unfinished() == []
    assert list((store.root / PENDING).iterdir()) == []


def test_publishing_again_replaces_at_once(store: Store, tmp_path: Path) -> None:
    for number in (1, 2):
        made = put(store.root / ".pending" / f"made{number}", number=number)
        store.publish(made, "acme/x", None)
    assert json.loads((store.find("acme/x") / "config.json").read_text())["number"] == 2
    assert list((store.root / ".pending").iterdir()) == []


def test_missing_model_is_told_with_those_there_are(store: Store) -> None:
    put(store.root / "plain")
    with pytest.raises(ModelNotFound, match=r"acme/x is not in .*there are: plain"):
        store.delete("acme/x")


@pytest.mark.parametrize(("form", "size"), [("q7", None), ("q4", 33), ("mxfp4", 64), ("bf16", 64), (None, 64)])
def test_impossible_forms_are_refused(form: str | None, size: int | None) -> None:
    with pytest.raises(MlxspecError, match=r"possible|needs a quantization"):
        check_form(form, size)
