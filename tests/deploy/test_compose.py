"""docker-compose.yml and its overlays, read and not run: who may what, who waits for whom, who sees which key.

What an engine does with them is `make compose-test`.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest
import yaml  # type: ignore[import-untyped]

from fedhlm import config
from fedhlm.errors import ConfigError
from fedhlm_doors.serving import door_of
from fedhlm_fleet.container import console
from fedhlm_fleet.container.init import API_KEYS, plan
from fedhlm_fleet.pki.mosquitto import LIMITS

ROOT: Final = Path(__file__).parents[2]
BASE: Final = "docker-compose.yml"
PLAIN, SCALE, CLUSTER, HOST, MODEL, OBSERVE = (
    f"compose.{name}.yml" for name in ("plain", "scale", "cluster", "host", "model", "observe")
)
OVERLAYS: Final = (PLAIN, SCALE, CLUSTER, HOST, MODEL, OBSERVE, "compose.gpu.yml")
CLOUD: Final = "broker-cloud"
OUTER: Final = {"host", "host-brokers"}  # networks that publish ports
WATCHERS: Final = ("prometheus", "grafana")  # no parties of the fleet: no certificate, no broker
VARIABLE: Final = re.compile(r"\$\{(\w+)(:?-)([^}]*)\}")
DOCKERFILES: Final = sorted((ROOT / "deploy/docker").glob("*.Dockerfile"))
MODELS: Final = {"agent": ["slm"], "cloud": ["llm"], "edge": [], "init": []}


class Instead:
    """A value that replaces another one where Compose would merge the two (`!override`)."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads YAML with Compose's own tag."""


def _instead(loader: Any, node: Any) -> Instead:
    construct = loader.construct_mapping if isinstance(node, yaml.MappingNode) else loader.construct_sequence
    return Instead(construct(node, deep=True))


Loader.add_constructor("!override", _instead)


def read(name: str, **given: str) -> dict[str, Any]:
    """A compose file with its variables' defaults in place, and those that are given."""

    def value(found: re.Match[str]) -> str:
        wanted = given.get(found[1])
        return found[3] if wanted is None or (found[2] == ":-" and not wanted) else wanted

    text = VARIABLE.sub(value, (ROOT / name).read_text("utf-8"))
    assert "${" not in text, "every variable has a default"
    found: dict[str, Any] = yaml.load(text, Loader)  # noqa: S506 - a safe one
    return found


def merged(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """As Compose merges what is used here: mappings by key, volumes by what they cover, networks, all else replaced."""
    out = dict(base)
    for key, value in overlay.items():
        if isinstance(value, Instead):
            out[key] = value.value
        elif key == "networks" and isinstance(value, list):
            out[key] = list(dict.fromkeys((*out.get(key, []), *value)))
        elif isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = merged(out[key], value)
        elif key == "volumes" and isinstance(value, list):
            out[key] = list({v.split(":")[1]: v for v in (*out.get(key, []), *value)}.values())
        else:
            out[key] = value
    return out


def fleet(*overlays: str) -> dict[str, Any]:
    """The whole of it."""
    whole = read(BASE)
    for name in overlays:
        overlay = read(name)
        for service, body in overlay["services"].items():
            if "extends" in body:
                assert body["extends"]["file"] == BASE
                parent = whole["services"][body["extends"]["service"]]
                overlay["services"][service] = merged(parent, {k: v for k, v in body.items() if k != "extends"})
        whole = merged(whole, overlay)
    return whole


WHOLE: Final = [pytest.param(fleet(*names), id="+".join(names) or "base") for names in ((), *((o,) for o in OVERLAYS))]
SECURE: Final = [
    pytest.param(fleet(*names), id="+".join(names) or "base") for names in ((), (SCALE,), (CLUSTER,), (HOST,))
]


def services(whole: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = whole["services"]
    return found


def lasting(whole: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The services that stay up."""
    return {
        name: body
        for name, body in services(whole).items()
        if name != "init" and "tools" not in body.get("profiles", [])
    }


def clusters(whole: dict[str, Any]) -> list[str]:
    """The clusters, each of which has a broker."""
    return [name.removeprefix("broker-") for name in services(whole) if name.startswith("broker-") and name != CLOUD]


def mounts(body: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Volume to (path, mode)."""
    parts = [mount.split(":") for mount in body.get("volumes", [])]
    return {part[0]: (part[1], part[2] if len(part) > 2 else "rw") for part in parts}


def folders(body: dict[str, Any]) -> list[str]:
    """What is mounted of the host's own files."""
    return [volume for volume in mounts(body) if volume.startswith((".", "/", "~"))]


def settings_of(body: dict[str, Any]) -> dict[str, str]:
    """The environment without what is not for `fedhlm.config`."""
    found = body.get("environment", {})
    return {key: str(value) for key, value in found.items() if key != "LD_LIBRARY_PATH" and not key.startswith("GF_")}


@pytest.mark.parametrize("whole", WHOLE)
def test_every_service_is_locked_in(whole: dict[str, Any]) -> None:
    for name, body in services(whole).items():
        assert body["read_only"] is True, name
        assert body["init"] is True, name
        assert body["cap_drop"] == ["ALL"], name
        assert body["security_opt"] == ["no-new-privileges:true"], name
        assert {"max-size", "max-file"} <= set(body["logging"]["options"]), name
        assert {"cpus", "memory", "pids"} <= set(body["deploy"]["resources"]["limits"]), name
        for port in body.get("ports", []):
            assert re.fullmatch(r"127\.0\.0\.1:\d+:(8883|11434|8808|3000)", port), (
                "for this machine alone, with TLS or a key, or to look"
            )
        assert not {"privileged", "pid", "ipc", "devices", "group_add", "configs", "secrets"} & set(body), name
        for folder in folders(body):
            own = "./deploy/observe/" if name in WATCHERS else "./models/"
            assert folder.startswith(own) or mounts(body)[folder][0].startswith("/models/"), name
        user, _, group = body["user"].partition(":")
        if name == "init":
            assert (user, body["cap_add"], body["network_mode"]) == ("0", ["CHOWN"], "none")
        else:
            assert int(user) > 0, name
            assert int(group) > 0, name
            assert not {"cap_add", "network_mode"} & set(body), name


@pytest.mark.parametrize("whole", WHOLE)
def test_what_stays_up_has_a_health_and_is_restarted(whole: dict[str, Any]) -> None:
    assert len(lasting(whole)) >= 10
    for name, body in lasting(whole).items():
        assert body["restart"] == "unless-stopped", name
        assert body["healthcheck"]["test"][0] == "CMD", name
        assert {"interval", "timeout", "retries", "start_period", "start_interval"} <= set(body["healthcheck"]), name


@pytest.mark.parametrize("whole", WHOLE)
def test_who_waits_for_whom(whole: dict[str, Any]) -> None:
    for name, body in lasting(whole).items():
        waits = {other: how["condition"] for other, how in body["depends_on"].items()}
        assert waits.pop("init") == "service_completed_successfully", name
        assert set(waits.values()) <= {"service_healthy"}, name
        cluster = body.get("environment", {}).get("FEDHLM_CLUSTER__NAME")
        kind = name.partition("-")[0]
        expected: dict[str, set[str]] = {
            "broker": set(),
            "cloud": {"broker-cloud"},
            "edge": {f"broker-{cluster}", "broker-cloud"},
            "agent": {f"edge-{cluster}"},
            "console": {f"broker-{name}" for name in clusters(whole)},
            **{watcher: set() for watcher in WATCHERS},
        }
        assert set(waits) == expected[kind], name


@pytest.mark.parametrize("whole", WHOLE)
def test_only_edges_are_in_two_networks_and_none_leads_outside(whole: dict[str, Any]) -> None:
    networks = dict(whole["networks"])
    closed = {f"com.docker.network.bridge.enable_{what}": "false" for what in ("ip_masquerade", "icc")}
    for name in OUTER & networks.keys():
        assert networks.pop(name) == {"driver_opts": closed}
    assert all(network == {"internal": True} for network in networks.values())
    for name, body in services(whole).items():
        if name == "init":
            continue
        cluster = body.get("environment", {}).get("FEDHLM_CLUSTER__NAME", name.removeprefix("broker-"))
        expected = ["cloud", cluster] if name.startswith("edge-") else [cluster]
        if name == "console":
            assert body["networks"].pop("host") == {"aliases": ["page"]}, "which is where its page is"
            assert all(nothing == {} for nothing in body["networks"].values())
            assert list(body["networks"]) == clusters(whole)
            continue
        scraped = "observe" in networks and (name == "cloud" or name.startswith("edge-"))
        expected = ["observe"] if name in WATCHERS else [*expected, *(["observe"] if scraped else [])]
        published = ["host-brokers" if name.startswith("broker-") else "host"] if "ports" in body else []
        assert body["networks"] == [*expected, *published], name


@pytest.mark.parametrize("whole", WHOLE)
def test_a_part_shares_one_network_with_its_broker_and_that_is_no_outer_one(whole: dict[str, Any]) -> None:
    """The engine answers a name with the address in any network that both are in."""
    for name, body in services(whole).items():
        words = [*map(str, body.get("command", [])), *settings_of(body).values()]
        for broker in {found for word in words for found in re.findall(r"//(broker-\w+):", word)}:
            common = set(body["networks"]) & set(services(whole)[broker]["networks"])
            assert len(common) == 1, (name, broker)
            assert not common & OUTER, (name, broker)


@pytest.mark.parametrize("whole", WHOLE)
def test_each_secret_is_seen_by_the_init_service_and_one_other(whole: dict[str, Any]) -> None:
    seen: dict[str, list[str]] = {volume: [] for volume in whole["volumes"]}
    for name, body in services(whole).items():
        for volume, (_, mode) in mounts(body).items():
            if volume in folders(body):
                assert mode == "ro", (name, volume)
                continue
            seen[volume].append(name)
            assert mode == ("ro" if volume.startswith("tls-") and name != "init" else "rw"), (name, volume)
    assert seen.pop("pki") == ["init"]
    for volume, users in seen.items():
        own = volume.partition("-")[2]
        assert users == (["init", own] if volume.startswith("tls-") else [own]), volume
    for name, body in services(whole).items():
        if name != "init":
            assert (name in WATCHERS) + sum(volume.startswith("tls-") for volume in mounts(body)) == 1, name


@pytest.mark.parametrize("whole", WHOLE)
def test_every_variable_is_a_setting_with_a_value_that_it_can_have(whole: dict[str, Any]) -> None:
    for name, body in services(whole).items():
        environ = settings_of(body)
        assert all(key.startswith(config.ENV_PREFIX) for key in environ), name
        loaded = config.load(environ=environ).config
        if environ and name != "console":  # which is given its brokers as words
            loaded.broker.address()
        if loaded.edge.upstream.url:
            loaded.edge.upstream.address(key="edge.upstream.url")


@pytest.mark.parametrize("whole", SECURE)
def test_the_plan_names_everybody_as_they_call_themselves(whole: dict[str, Any], tmp_path: Path) -> None:
    at = {path: volume for volume, (path, _) in mounts(services(whole)["init"]).items()}
    for path in at:
        (tmp_path / path.removeprefix("/")).mkdir(parents=True)
    parties = {
        at["/" + str(party.folder.relative_to(tmp_path))].removeprefix("tls-"): party
        for party in plan(tmp_path / "parts")
    }
    assert set(parties) == {name for name in services(whole) if name != "init"}
    hosts = {host: party for party in parties.values() for host in party.hosts if host != "localhost"}
    for service, party in parties.items():
        environ = settings_of(services(whole)[service])
        settings = config.load(environ=environ).config
        urls = [settings.broker.address()] if environ and service != "console" else []
        match party.role:
            case "agent":
                assert (party.name, *party.clusters) == (settings.agent.id, settings.cluster.name)
            case "edge":
                assert party.name == f"edge-{settings.cluster.name}"
                upstream = settings.edge.upstream.address(key="edge.upstream.url")
                assert hosts[upstream.host].clusters == ()
                assert upstream.files == settings.broker.address().files
            case "client":
                assert party.clusters == (settings.cluster.name,)
                assert party.name == service
            case "observer":
                assert (service, party.clusters) == ("console", ())
            case "broker":
                assert service in party.hosts, "parties reach it by its service's name"
        for url in urls:
            assert url.tls
            assert hosts[url.host].clusters == (() if party.role == "cloud" else party.clusters)


def test_a_third_cluster_shares_nothing_with_another_but_the_clouds_network() -> None:
    whole = fleet(CLUSTER)
    for name in ("broker-cellar", "edge-cellar", "agent-vault", "ask-cellar"):
        body = services(whole)[name]
        assert not re.search("garden|shed|pond", str(body)), name
        assert "cellar" in body["networks"], name


def test_models_of_ones_own_reach_the_cloud_and_every_agent() -> None:
    whole = fleet(MODEL)
    for name, body in lasting(whole).items():
        kind = name.partition("-")[0]
        model = {"cloud": "llm", "agent": "slm"}.get(kind)
        if model is not None:
            assert mounts(body)[f"./models/{model}"] == (f"/models/{model}", "ro")
            loaded = config.load(environ=settings_of(body)).config
            assert (loaded.cloud.model if kind == "cloud" else loaded.agent.model) == f"/models/{model}"


@pytest.mark.parametrize("cluster", ["home", "garden"])
def test_a_client_on_the_host_finds_what_is_published(cluster: str) -> None:
    loaded = config.load(file=ROOT / "deploy" / "docker" / f"host-{cluster}.toml", environ={}).config
    broker = services(fleet(HOST))[f"broker-{cluster}"]
    address = loaded.broker.address()
    assert broker["ports"] == [f"127.0.0.1:{address.port}:8883"]
    assert (address.tls, loaded.cluster.name) == (True, cluster)
    assert loaded.broker.cert == f"keys/{cluster}/party.crt"
    ignored = (ROOT / ".gitignore").read_text("utf-8").splitlines()
    assert {".env", "/keys/"} <= set(ignored)


@pytest.mark.parametrize("whole", WHOLE)
def test_one_agent_of_each_first_cluster_serves_the_apis_to_this_machine_with_a_key(whole: dict[str, Any]) -> None:
    served = {
        name: body["ports"] for name, body in services(whole).items() if name.startswith("agent-") and "ports" in body
    }
    assert served == {"agent-porch": ["127.0.0.1:18841:11434"], "agent-shed": ["127.0.0.1:18842:11434"]}
    for name, body in lasting(whole).items():
        api = config.load(environ=settings_of(body)).config.api
        assert bool(api.listen) == (name in served), name
        if api.listen:
            assert api.listen.rpartition(":")[2] == "11434"
            folder, file = api.keys.rsplit("/", 1)
            assert (f"tls-{name}", (folder, "ro")) in mounts(body).items()
            assert file == API_KEYS
            with pytest.raises(ConfigError, match=r"api\.keys"):  # there, and not without them
                door_of(api)


@pytest.mark.parametrize("whole", WHOLE)
def test_the_page_of_the_console_is_published_for_this_machine_and_reached_from_no_brokers_network(
    whole: dict[str, Any],
) -> None:
    body = services(whole)["console"]
    assert body["ports"] == ["127.0.0.1:8808:8808"]
    words = dict(zip(body["command"][::2], body["command"][1::2], strict=True))
    assert words["--listen"] == "page:8808"
    brokers = [word for word in body["command"] if "://" in word]
    plain = not config.load(environ=settings_of(body)).config.broker.ca
    form = "mqtt://broker-{}:1883" if plain else "mqtts://broker-{}:8883"
    assert brokers == [form.format(cluster) for cluster in clusters(whole)]
    assert body["entrypoint"] == ["python", "-m", console.__name__]
    assert "--allow-prompts" not in body["command"]


def test_one_variable_closes_the_apis() -> None:
    for name, body in read(BASE, API_LISTEN="")["services"].items():
        assert not config.load(environ=settings_of(body)).config.api.listen, name


def test_prometheus_scrapes_who_serves_metrics_and_agents_report_to_them() -> None:
    whole = fleet(OBSERVE)
    scraped = yaml.safe_load((ROOT / "deploy/observe/prometheus.yml").read_text("utf-8"))["scrape_configs"]
    targets = {target for job in scraped for group in job["static_configs"] for target in group["targets"]}
    served = set()
    for name, body in lasting(whole).items():
        telemetry = config.load(environ=settings_of(body)).config.telemetry
        if telemetry.metrics_port:
            assert telemetry.metrics_host == "0.0.0.0"
            served.add(f"{name}:{telemetry.metrics_port}")
        assert bool(telemetry.report_s) == name.startswith("agent-"), name
    assert targets == served
    assert {target.partition(":")[0] for target in targets} == {"cloud", "edge-home", "edge-garden"}
    for name in WATCHERS:
        for folder in folders(services(whole)[name]):
            assert (ROOT / folder).is_file(), folder
    provisioned = yaml.safe_load((ROOT / "deploy/observe/dashboards.yml").read_text("utf-8"))["providers"]
    held = {path.rpartition("/")[0] for path, _ in mounts(services(whole)["grafana"]).values()}
    assert {provider["options"]["path"] for provider in provisioned} <= held


def test_plain_leaves_no_certificate_anywhere() -> None:
    for name, body in services(fleet(PLAIN)).items():
        text = str(body.get("environment", {})) + str(body.get("healthcheck", {}))
        assert "mqtts" not in text, name
        assert "/tls/" not in text.replace(f"/tls/{API_KEYS}", ""), name
        assert "--cert" not in text, name


def test_the_example_names_every_variable_with_its_default() -> None:
    lines = [line for line in (ROOT / ".env.example").read_text("utf-8").splitlines() if line and line[0] != "#"]
    example = dict(line.split("=", 1) for line in lines)
    assert example.pop("COMPOSE_FILE") == BASE
    used: dict[str, set[str]] = {}
    for name in (BASE, *OVERLAYS):
        for found in VARIABLE.finditer((ROOT / name).read_text("utf-8")):
            used.setdefault(found[1], set()).add(found[3])
    assert {name: {default} for name, default in example.items()} == used
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert example["VERSION"] == version


@pytest.mark.parametrize("whole", WHOLE)
def test_every_image_has_a_tag_that_stays(whole: dict[str, Any]) -> None:
    images = {body["image"] for body in services(whole).values()}
    images |= {
        found
        for path in DOCKERFILES
        for found in re.findall(r"^ARG PYTHON_IMAGE=(\S+)", path.read_text(), re.MULTILINE)
    }
    for image in images:
        tag = image.rpartition("/")[2].partition(":")[2]
        assert re.match(r"v?\d+\.\d+", tag), image


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_has_two_stages_one_model_and_no_tool_of_the_first(path: Path) -> None:
    text = path.read_text("utf-8")
    first, second = re.split(r"^FROM .*$", text, flags=re.MULTILINE)[1:]
    assert "pip" in first
    assert "pip" not in second
    assert "apt" not in second
    assert all(line.startswith("COPY --from=build ") for line in second.splitlines() if line.startswith("COPY"))
    assert re.findall(r"^USER (.*)$", second, re.MULTILINE) == ["10001:10001"]
    assert "# syntax=" not in text
    assert re.findall(r"^COPY fedhlm_zoo/artefacts/?(\S*) ", first, re.MULTILINE) == MODELS[path.stem]
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert "*" in ignored
    for source in re.findall(r"^COPY (?!--)(.*) \S+$", first, re.MULTILINE):
        assert all(any(name.startswith(line[1:]) for line in ignored if line[:1] == "!") for name in source.split())
        assert all((ROOT / name).exists() for name in source.split())


@pytest.mark.parametrize(
    ("part", "others"),
    [
        ("agent", set()),
        ("serve", {"onnxruntime", "tokenizers"}),
        ("edge", {"onnxruntime", "tokenizers"}),
        ("operator", {"onnxruntime", "tokenizers"}),
    ],
)
def test_the_libraries_of_an_image_are_those_of_its_part(part: str, others: set[str]) -> None:
    script = ROOT / "deploy/docker/requirements.py"
    done = subprocess.run([sys.executable, script, part], cwd=ROOT, capture_output=True, text=True, check=True)
    printed = set(done.stdout.split("\n")[:-1])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(project["optional-dependencies"][part]) <= printed
    left_out = {line.partition(">")[0] for line in set(project["dependencies"]) - printed}
    assert left_out == others, "a plain installation serves every part, an image one"


@pytest.mark.parametrize("whole", WHOLE)
def test_every_image_of_ours_is_built_by_one_service(whole: dict[str, Any]) -> None:
    ours = [body for body in services(whole).values() if body["image"].startswith("fedhlm/")]
    built = [body["image"] for body in ours if "build" in body]
    assert sorted(built) == sorted({body["image"] for body in ours})


def test_a_broker_stops_at_its_own_limit_and_not_at_its_containers() -> None:
    services = read(BASE)["services"]
    units = {"m": 2**20, "g": 2**30}
    for name, body in services.items():
        if name.startswith("broker-"):
            memory = body["deploy"]["resources"]["limits"]["memory"]
            own = LIMITS["cloud" if name == "broker-cloud" else "cluster"].memory_bytes
            assert own + 32 * 2**20 <= int(memory[:-1]) * units[memory[-1]], name
