"""Configuration: which source wins, and that every mistake names its key."""

import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common import config as configuration
from common.config import Config, ModelConfig
from common.errors import ConfigError

TOP = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLXSPEC_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def write(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(text)
    return folder / "config.toml"


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_packages_are_ours() -> None:
    import common
    import router

    assert Path(str(common.__file__)).is_relative_to(TOP)
    assert Path(str(router.__file__)).is_relative_to(TOP)


def test_config_toml_holds_every_default() -> None:
    assert configuration.load(TOP / "config.toml", env={}) == Config()


def test_config_toml_names_every_key() -> None:
    written = tomllib.loads((TOP / "config.toml").read_text())
    expected: dict[str, Any] = msgspec.to_builtins(Config())
    assert [expected.pop(name) for name in ("models", "groups", "aliases")] == [{}, {}, {}]
    assert {k: list(v) if isinstance(v, dict) else None for k, v in written.items()} == {
        k: list(v) if isinstance(v, dict) else None for k, v in expected.items()
    }


def test_config_toml_shows_every_key_of_a_model() -> None:
    text = (TOP / "config.toml").read_text()
    example = tomllib.loads(
        text[text.index("# [models.my-model]") : text.index("\n\n# Several models")]
        .replace("# ", "", 1)
        .replace("\n# ", "\n")
    )
    shown = example["models"]["my-model"]
    assert set(shown) == set(ModelConfig.__struct_fields__)
    assert msgspec.convert(shown, ModelConfig).path == "my-model"


def test_later_source_wins(tmp_path: Path) -> None:
    file = write(tmp_path, "[engine]\nmax_batch_size = 4\n[server]\nport = 1000\nmax_choices = 3\n")
    env = {"MAX_BATCH_SIZE": "5", "MAX_CONCURRENT_REQUESTS": "7"}
    config = configuration.load(file, env, {"server.port": 2000})
    assert config.engine.max_batch_size == 5
    assert config.server.max_concurrent_requests == 7
    assert config.server.port == 2000
    assert config.server.max_choices == 3


def test_file_of_the_state_folder_is_read_by_default(home: Path) -> None:
    write(home, "[server]\nport = 1234\n")
    assert configuration.load(env={}).server.port == 1234


def test_without_a_file_everything_has_its_default() -> None:
    assert configuration.load(env={}) == Config()


@pytest.mark.parametrize(
    ("variable", "text", "section", "key", "value"),
    [
        ("AUTO_DRAFT", "off", "speculation", "auto_draft", False),
        ("MAX_BATCH_SIZE", "8", "engine", "max_batch_size", 8),
        ("MAX_CONCURRENT_REQUESTS", "9", "server", "max_concurrent_requests", 9),
        ("MEMORY_LIMIT_GB", "12.5", "supervisor", "memory_limit_gb", 12.5),
    ],
)
def test_environment_variables_of_the_seed_work(
    variable: str, text: str, section: str, key: str, value: object
) -> None:
    config = configuration.load(env={variable: text})
    assert getattr(getattr(config, section), key) == value


def test_penalties_of_the_configuration_are_the_defaults(tmp_path: Path) -> None:
    text = "[generation]\nrepetition_penalty = 1.25\npresence_penalty = -0.5\nfrequency_penalty = 0.75\n"
    generation = configuration.load(write(tmp_path, text), env={}).generation
    sampling = configuration.default_sampling(generation)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.25, -0.5, 0.75)


def test_auto_draft_off_makes_plain_decoding_the_default() -> None:
    config = configuration.load(env={"AUTO_DRAFT": "off"})
    assert not configuration.default_speculation(config.speculation).is_on
    assert configuration.default_speculation(configuration.Config().speculation).is_on


def test_the_seeds_variables_for_drafting_count() -> None:
    config = configuration.load(
        env={"DRAFT_MODEL_PATH": "some/draft", "DRAFT_LAYERS_RATIO": "0.75", "AUTO_DRAFT": "no"}
    )
    assert config.speculation.draft_model == "some/draft"
    assert config.speculation.draft_layers_ratio == 0.75
    assert not config.speculation.auto_draft


@pytest.mark.parametrize("ratio", ["1", "1.5"])
def test_a_drafter_of_all_layers_is_refused(ratio: str) -> None:
    with pytest.raises(ConfigError, match=r"draft_layers_ratio is 1\.[05]; it must lie in \[0, 1\)"):
        configuration.load(env={"DRAFT_LAYERS_RATIO": ratio})


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[server]\nprot = 1\n", "prot"),
        ("[sever]\nport = 1\n", "sever"),
        ('[server]\nport = "x"\n', "port"),
        ("[server]\nport = 70000\n", "server.port"),
        ('[server]\nhost = "0.0.0.0"\n', "server.host"),
        ("[engine]\nmax_batch_size = 0\n", "engine.max_batch_size"),
        ("[engine]\nmax_batch_size = 1.5\n", "max_batch_size"),
        ('[engine]\nweights = "int3"\n', "int3"),
        ("[engine]\nkv_bits = 5\n", "kv_bits is 5; possible: 0, 4, 8"),
        ('[models.m]\npath = "x"\nkv_bits = -4\n', "kv_bits is -4"),
        ("[generation]\ntemperature = 9.0\n", "temperature"),
        ("[generation]\npresence_penalty = -2.5\n", "presence_penalty"),
        ("[generation]\nrepetition_penalty = 0.0\n", "repetition_penalty"),
        ('[speculation]\ndrafter = "magic"\n', "drafter"),
        ("[supervisor]\nbackoff_first_s = -1.0\n", "supervisor.backoff_first_s"),
        ("[models.m]\npreload = true\n", "path"),
        ('[models.m]\npath = "x"\ndrafter = "magic"\n', "magic"),
        ('[models.m]\npath = "x"\ncolour = 1\n', "colour"),
        ('[log]\nlevel = "loud"\n', "log.level"),
        ("server = 1\n", "server"),
        ("[server\n", "TOML"),
    ],
)
def test_mistake_in_the_file_is_named(tmp_path: Path, text: str, names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        configuration.load(write(tmp_path, text), env={})


@pytest.mark.parametrize(
    ("variable", "text"),
    [("MAX_BATCH_SIZE", "many"), ("MEMORY_LIMIT_GB", "lots"), ("AUTO_DRAFT", "maybe")],
)
def test_mistake_in_the_environment_is_named(variable: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"{variable}='{text}'"):
        configuration.load(env={variable: text})


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        configuration.load(tmp_path / "nowhere.toml", env={})


def test_empty_variable_is_no_variable() -> None:
    assert configuration.load(env={"MAX_BATCH_SIZE": " ", "MODEL_PATH": ""}) == Config()


def test_model_path_of_one_folder_becomes_the_default(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "llama-3.2")
    config = configuration.load(env={"MODEL_PATH": str(folder)})
    assert config.models == {"llama-3.2": ModelConfig(path=str(folder))}
    assert config.default_model == "llama-3.2"


def test_model_path_may_be_a_hub_id() -> None:
    config = configuration.load(env={"MODEL_PATH": "some-org/some.model"})
    assert config.models == {"some.model": ModelConfig(path="some-org/some.model")}
    assert config.default_model == "some.model"


def test_model_path_may_hold_several_models(tmp_path: Path) -> None:
    for name in ("b", "a", ".hidden"):
        make_model(tmp_path / "all" / name)
    config = configuration.load(env={"MODEL_PATH": str(tmp_path / "all")})
    assert list(config.models) == ["a", "b"]
    assert configuration.default_model(config, configuration.discover_models(config)) == "a"


def test_model_path_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="MODEL_PATH"):
        configuration.load(env={"MODEL_PATH": str(tmp_path)})


def test_model_folders_are_discovered(home: Path) -> None:
    make_model(home / "models" / "found")
    (home / "models" / "empty").mkdir()
    config = configuration.load(env={}, overrides={"models.given.path": "org/given"})
    assert set(configuration.discover_models(config)) == {"found", "given"}
    assert configuration.default_model(config, configuration.discover_models(config)) == "given"
    assert configuration.default_model(Config(), configuration.discover_models(Config())) == "found"


def test_default_model_is_none_without_models() -> None:
    assert configuration.default_model(Config(), {}) is None


def test_path_is_looked_up_as_it_is_then_in_the_models_folder(home: Path, tmp_path: Path) -> None:
    known = make_model(home / "models" / "m")
    elsewhere = make_model(tmp_path / "elsewhere")
    assert configuration.resolve_model_path("m") == str(known)
    assert configuration.resolve_model_path(str(elsewhere)) == str(elsewhere)
    assert configuration.resolve_model_path("org/m") == "org/m"


def test_effective_configuration_is_private_and_reads_back(tmp_path: Path) -> None:
    config = configuration.load(env={"MODEL_PATH": "org/m", "MAX_BATCH_SIZE": "3"})
    configuration.dump(config, tmp_path / "config.json")
    assert configuration.load_effective(tmp_path / "config.json") == config
    assert (tmp_path / "config.json").stat().st_mode & 0o777 == 0o600
