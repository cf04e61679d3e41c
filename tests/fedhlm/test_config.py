"""Properties of configuration: precedence, sources, errors that name what is wrong, secrets that never show."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhlm import config, settings
from fedhlm.config import load
from fedhlm.errors import ConfigError
from tests.fedhlm.configurations import MODES, error_of

SECRET = "correct horse battery staple"


# Precedence


@given(chosen=st.sets(st.sampled_from(["file", "env", "flag"])))
def test_the_highest_source_wins_and_is_named(chosen: set[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "precedence.toml"
    file.write_text("[generation.pipeline]\nblock = 3\n", "utf-8")
    name = "FEDHLM_GENERATION__PIPELINE__BLOCK"
    loaded = load(
        file=file if "file" in chosen else None,
        environ={name: "4"} if "env" in chosen else {},
        flags={"generation.pipeline.block": "5"} if "flag" in chosen else {},
    )
    ranking = [
        ("flag", 5, "flag --generation.pipeline.block"),
        ("env", 4, f"env {name}"),
        ("file", 3, f"file {file}"),
        ("preset", 20, "preset budget"),
    ]
    _, value, source = next(rank for rank in ranking if rank[0] in chosen | {"preset"})
    assert loaded.config.generation.pipeline.block == value
    assert loaded.sources["generation.pipeline.block"] == source


def test_what_no_source_sets_is_the_default_and_says_so() -> None:
    loaded = load(environ={})
    assert loaded.sources["generation.max_tokens"] == "default"
    assert loaded.config.generation.max_tokens == settings.Config().generation.max_tokens


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({}, "budget"),
        ({"file": True}, "hlm"),
        ({"file": True, "environ": {"FEDHLM_PRESET": "slm-only"}}, "slm-only"),
        ({"file": True, "environ": {"FEDHLM_PRESET": "slm-only"}, "preset": "llm-only"}, "llm-only"),
    ],
)
def test_the_preset_itself_follows_the_same_precedence(sources: dict[str, Any], expected: str, written: Any) -> None:
    if sources.pop("file", False):
        sources = {**sources, "file": written('preset = "hlm"\n')}
    loaded = load(**{"environ": {}, **sources})
    assert loaded.config.preset == expected
    assert loaded.config.generation.coupling == MODES[expected][0]
    assert loaded.sources["generation.coupling"] == f"preset {expected}"


def test_every_key_can_come_from_the_environment() -> None:
    defaults = load(environ={})
    values = {key: _lookup(defaults.config, key) for key in config.KEYS}
    loaded = load(environ={config.environment_name(key): str(value) for key, value in values.items()})
    assert loaded.config == defaults.config
    assert loaded.sources == {key: f"env {config.environment_name(key)}" for key in config.KEYS}


def test_every_key_but_passwords_can_be_a_flag() -> None:
    defaults = load(environ={})
    keys = [key for key in config.KEYS if not key.endswith("password")]
    loaded = load(environ={}, flags={key: str(_lookup(defaults.config, key)) for key in keys})
    assert loaded.config == defaults.config
    assert {loaded.sources[key] for key in keys} == {f"flag --{key}" for key in keys}


def test_a_file_sets_nested_sections(written: Any) -> None:
    file = written('[edge.upstream]\nurl = "mqtts://cloud:8884"\nprotocol = "3.1.1"\n[cluster]\nname = "barn"\n')
    loaded = load(file=file, environ={})
    assert loaded.config.edge.upstream.url == "mqtts://cloud:8884"
    assert loaded.config.edge.upstream.protocol == "3.1.1"
    assert loaded.config.broker.url == ""
    assert loaded.config.cluster.name == "barn"
    assert loaded.sources["edge.upstream.url"] == f"file {file}"


def test_variables_of_other_tools_are_left_alone() -> None:
    assert load(environ={"FEDHLM_DATA": "somewhere", "HOME": "x", "XFEDHLM_A": "y"}).config == load(environ={}).config


# Values


@given(seed=st.integers(0, 2**63 - 1), temperature=st.floats(0.0, 10.0))
def test_numbers_survive_the_way_through_text(seed: int, temperature: float) -> None:
    flags = {"generation.seed": str(seed), "generation.temperature": repr(temperature)}
    generation = load(environ={}, flags=flags).config.generation
    assert (generation.seed, generation.temperature) == (seed, temperature)


@pytest.mark.parametrize(
    ("key", "value", "expectation"),
    [
        ("generation.seed", "abc", "an integer from 0 up to 9223372036854775807"),
        ("generation.seed", "-1", "an integer from 0"),
        ("generation.seed", "1.5", "an integer from 0"),
        ("generation.max_tokens", "0", "an integer from 1 up to 65536"),
        ("generation.temperature", "hot", "a number from 0 up to 10"),
        ("generation.temperature", "nan", "a number from 0 up to 10"),
        ("generation.temperature", "inf", "a number from 0 up to 10"),
        ("generation.top_p", "0", "a number above 0 up to 1"),
        ("generation.gate", "sometimes", "one of always, never, random, threshold"),
        ("generation.coupling", "", "one of full, greedy, gumbel, lattice, published-cu, published-cu-online"),
        ("generation.pipeline.kind", "bush", "one of async, blocking, remote, tree"),
        ("generation.peers", "friends", "one of centroid, neighbour, none"),
        ("broker.protocol", "4", "one of 3.1.1, 5, auto"),
        ("edge.embedded_port", "65536", "an integer from 0 up to 65535"),
        ("edge.embedded_host", "", "non-empty text"),
        ("cluster.name", "a/b", "1..64 letters, digits"),
        ("agent.id", "", "1..64 letters, digits"),
        ("telemetry.log_level", "LOUD", "one of DEBUG, ERROR, INFO, WARNING"),
        ("broker.url", "http://host", "mqtt://"),
        ("broker.url", "mqtt://host:99999", "port"),
        ("broker.root", "fedhlm/+", "without wildcards"),
        ("broker.root", "$SYS", "without wildcards"),
        ("edge.upstream.root", "a//b", "without wildcards"),
    ],
)
def test_an_unusable_value_names_key_value_expectation_and_source(key: str, value: str, expectation: str) -> None:
    error = error_of(flags={key: value})
    assert (error.key, error.value) == (key, value)
    assert str(error).startswith(f"{key} must be {error.expectation} (got {value!r} from flag --{key}")
    assert expectation in error.expectation
    assert error.source == f"flag --{key}"


@pytest.mark.parametrize(
    ("text", "key", "expectation"),
    [
        ('[generation]\nseed = "7"\n', "generation.seed", "an integer"),
        ("[generation]\nseed = nan\n", "generation.seed", "an integer"),
        ("[generation]\ntemperature = nan\n", "generation.temperature", "a number"),
        ("[broker]\nurl = 5\n", "broker.url", "text"),
        ("[broker.url]\nhost = 5\n", "broker.url", "text"),
        ("broker = 'mqtt://host'\n", "broker", "a section of keys"),
        ("generation = [1]\n", "generation", "a section of keys"),
    ],
)
def test_a_file_is_typed_strictly(text: str, key: str, expectation: str, written: Any) -> None:
    file = written(text)
    error = error_of(file=file)
    assert error.key == key
    assert expectation in error.expectation
    assert error.source == f"file {file}"


def test_an_async_window_shorter_than_its_block_is_refused() -> None:
    error = error_of(preset="exact", flags={"generation.pipeline.window": "4"})
    assert (error.key, error.value) == ("generation.pipeline.window", 4)
    assert "at least generation.pipeline.block, 8" in error.expectation


@pytest.mark.parametrize("half", ["cert", "key"])
def test_half_a_client_certificate_is_refused(half: str) -> None:
    flags = {"broker.url": "mqtts://host", f"broker.{half}": "me.pem"}
    assert "cert and key" in error_of(flags=flags).expectation


# Unknown keys, presets and files


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"flags": {"generation.sed": "1"}}, "generation.sed is not a known key: did you mean generation.seed?"),
        ({"flags": {"prest": "hlm"}}, "prest is not a known key: did you mean preset? (got 'hlm'"),
        ({"flags": {"broker.prot": "5"}}, "did you mean broker.protocol?"),
        (
            {"flags": {"zzz": "1"}},
            "zzz is not a known key: `fedhlm config explain` lists all keys (got '1' from flag --zzz)",
        ),
        ({"flags": {"broker": "1"}}, "broker must be a section of keys, not a value (got '1' from flag --broker)"),
        (
            {"environ": {"FEDHLM_BROKER_URL": "mqtt://host"}},
            "did you mean FEDHLM_BROKER__URL? (got 'mqtt://host' from env FEDHLM_BROKER_URL)",
        ),
    ],
)
def test_an_unknown_key_suggests_the_nearest(sources: dict[str, Any], message: str) -> None:
    assert message in str(error_of(**sources))


def test_an_unknown_key_in_a_file_names_the_file(written: Any) -> None:
    file = written("[generation.pipeline]\nwindo = 3\n")
    message = str(error_of(file=file))
    assert message.startswith("generation.pipeline.windo is not a known key: did you mean generation.pipeline.window?")
    assert str(file) in message


def test_malformed_toml_names_file_and_line(written: Any) -> None:
    file = written("[broker]\nurl = \n")
    message = str(error_of(file=file))
    assert str(file) in message
    assert "must be TOML" in message
    assert "line 2" in message


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a = " + b"[" * 100_000])
def test_a_file_that_is_no_toml_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(content)
    assert " must be TOML (got " in str(error_of(file=file))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "No such file" in error_of(file=tmp_path / "none.toml").why
    assert "Is a directory" in error_of(file=tmp_path).why


def test_an_unknown_preset_lists_the_known_ones() -> None:
    error = error_of(preset="exat")
    assert error.key == "preset"
    assert (
        "one of budget, colocated, cu-hlm, exact, fedhlm, hlm, llm-only, rand-hlm, slm-only, speculative, u-hlm"
        in error.expectation
    )
    assert "did you mean 'exact'?" in error.expectation
    assert error.source == "flag --preset"


@given(
    variables=st.dictionaries(
        st.sampled_from(config.KEYS).map(config.environment_name) | st.text(max_size=12).map(config.ENV_PREFIX.__add__),
        st.text(max_size=12),
    )
)
def test_any_environment_gives_a_configuration_or_a_config_error(variables: dict[str, str]) -> None:
    try:
        loaded = load(environ=variables)
    except ConfigError:
        return
    assert set(loaded.sources) == set(config.KEYS)


@given(content=st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_file_gives_a_configuration_or_a_config_error(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.toml"
    file.write_bytes(content)
    try:
        loaded = load(file=file, environ={})
    except ConfigError as error:
        message = str(error)
    else:
        message = str(file) if loaded.config == load(environ={}).config else "a change that nobody asked for"
    assert str(file) in message


# Secrets


@pytest.mark.parametrize("key", ["broker.password", "edge.upstream.password"])
def test_a_password_shows_nowhere(key: str) -> None:
    loaded = load(environ={config.environment_name(key): SECRET})
    assert _lookup(loaded.config, key) == SECRET
    shown = f"{loaded!r} {loaded.config!r} {loaded.config} {loaded.rows()} {config.check(loaded)}"
    assert SECRET not in shown
    assert dict(loaded_rows(loaded))[key] == '"***"'


def test_a_password_inside_a_url_shows_nowhere() -> None:
    loaded = load(environ={"FEDHLM_BROKER__URL": f"mqtt://me:{SECRET}@host"})
    assert loaded.config.broker.address().password == SECRET
    assert SECRET not in f"{loaded!r}{config.check(loaded)}{loaded.config.broker.address()!r}"


@pytest.mark.parametrize(
    "sources",
    [
        {"flags": {"broker.password": SECRET}},
        {"flags": {"broker.url": f"mqtt://me:{SECRET}@host"}},
        {"environ": {"FEDHLM_BROKER__PASSWROD": SECRET}},
        {"environ": {"FEDHLM_BROKER__URL": f"ftp://me:{SECRET}@host"}},
        {"environ": {"FEDHLM_BROKER": f"mqtt://me:{SECRET}@host"}},
    ],
)
def test_a_refused_secret_is_not_repeated_in_the_error(sources: dict[str, Any]) -> None:
    assert SECRET not in str(error_of(**sources))


def test_a_password_of_the_wrong_type_in_a_file_is_not_repeated(written: Any) -> None:
    message = str(error_of(file=written("[broker]\npassword = 48151623\n")))
    assert "48151623" not in message
    assert "broker.password must be text (got '***'" in message


def test_a_password_is_refused_on_the_command_line_with_the_way_out() -> None:
    assert "FEDHLM_BROKER__PASSWORD" in error_of(flags={"broker.password": SECRET}).expectation


# What parts use


def test_the_address_joins_url_and_credentials() -> None:
    broker = settings.Broker(url="mqtts://host", username="me", password=SECRET, ca="ca.pem")
    address = broker.address()
    assert (address.host, address.port, address.tls) == ("host", 8883, True)
    assert (address.username, address.password, address.files.ca) == ("me", SECRET, "ca.pem")


def test_no_url_is_no_address() -> None:
    with pytest.raises(ConfigError, match=r"edge\.upstream\.url must be .* \(got ''\)"):
        settings.Broker().address(key="edge.upstream.url")


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        settings.Config().preset = "hlm"  # type: ignore[misc]


def test_the_listing_has_one_row_per_key_with_its_source() -> None:
    loaded = load(environ={}, flags={"agent.id": "porch"})
    lines = config.check(loaded).splitlines()
    assert len(lines) == len(config.KEYS) + 1
    assert [line.split()[0] for line in lines[1:]] == list(config.KEYS)
    (line,) = [line for line in lines if line.startswith("agent.id ")]
    assert line.split() == ["agent.id", '"porch"', "flag", "--agent.id"]


def test_the_listing_survives_bytes_that_are_no_text() -> None:
    listing = config.check(load(environ={"FEDHLM_AGENT__MODEL": "caf\udce9"}))
    assert "caf\\udce9" in listing.encode("utf-8").decode()


def loaded_rows(loaded: config.Loaded) -> list[tuple[str, str]]:
    return [(key, value) for key, value, _ in loaded.rows()]


def _lookup(root: msgspec.Struct, key: str) -> object:
    value: object = root
    for part in key.split("."):
        value = getattr(value, part)
    return value


def test_a_preset_that_prompts_ask_for_again_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(environ={}, flags={"preset": "budget"})
    first = loaded.asked("exact")
    assert first.config.preset == "exact"

    def never(*_layers: object) -> Any:
        raise AssertionError

    monkeypatch.setattr("fedhlm.config._merge", never)
    assert loaded.asked("exact") is first
    with pytest.raises(ConfigError):
        loaded.asked("none-such")
