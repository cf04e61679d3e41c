"""`python -m tests.deploy.engine`: docker-compose.yml on a real engine, from images to nothing left.

Builds, starts, asks agents over the bus and compares with what the large model writes alone; kills an agent, an edge, a
broker and the cloud from inside and asks again when the engine has brought them back. Prints times and sizes.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from fedhlm.decoding.alone import Alone
from fedhlm.protocol.messages import Sampling
from fedhlm_fleet.container.init import API_KEYS
from fedhlm_zoo.shipped import model_folder

ROOT: Final = Path(__file__).parents[2]
TEXT: Final = "Oil prices rise\n"
TOKENS: Final = 32
SEED: Final = 7
TEMPERATURE: Final = 0.8
LIMIT_S: Final = 180.0
OPTIONS: Final = ("--preset=exact", f"--tokens={TOKENS}", f"--seed={SEED}", f"--temperature={TEMPERATURE}", "--json")
# What an agent logs of a request: tokens by source, time, bytes.
LOGGED: Final = rf"INFO .*request \S+: length, {TOKENS} tokens \({TOKENS} cloud\), \d+ ms, [\d,]+ bytes up"
KILLED: Final = ("agent-porch", "edge-home", "broker-home", "cloud")
# From inside, as a crash would: after `docker kill` the engine takes the end for wanted and does not restart.
DIE: Final = ("sh", "-c", "kill -9 -1")
# Any free ports of this machine, so that a trial can run beside a fleet.
PORTS: Final = {"HOME_API_PORT": "0", "GARDEN_API_PORT": "0", "CONSOLE_PORT": "0"}
IMAGES: Final = ("agent", "edge", "cloud", "init")
AGENT_MAX_BYTES: Final = 250_000_000  # without its base
BASE: Final = os.environ.get("PYTHON_IMAGE", "python:3.11-slim-bookworm")


class Trouble(Exception):
    """What went wrong, in words."""


class Fleet:
    """One compose project of its own name."""

    def __init__(self, files: Sequence[str]) -> None:
        self.project = f"fedhlm-test-{os.getpid()}"
        self.plain = "compose.plain.yml" in files
        self.third = "compose.cluster.yml" in files
        self.host = "compose.host.yml" in files
        self._base = ["docker", "compose", "--project-name", self.project, *(f"--file={name}" for name in files)]

    def compose(self, *arguments: str, limit_s: float = LIMIT_S, check: bool = True) -> str:
        """Run `docker compose`; its output. Raises Trouble when it fails."""
        return run(*self._base, *arguments, limit_s=limit_s, check=check)

    def ask(self, cluster: str, agent: str) -> list[int]:
        """The ids that an agent answers with, over the bus."""
        return ids_in(self.compose("run", "--rm", "-T", f"ask-{cluster}", agent, TEXT, *OPTIONS))

    def unpack(self, cluster: str, folder: Path) -> None:
        """Write the certificate and key of the host's client of a cluster to a folder."""
        printer = subprocess.Popen(
            [*self._base, "run", "--rm", "-T", f"host-{cluster}"], cwd=ROOT, stdout=subprocess.PIPE
        )
        done = subprocess.run(["tar", "--extract", "--directory", folder], stdin=printer.stdout, timeout=LIMIT_S)
        if printer.wait(LIMIT_S) or done.returncode:
            raise Trouble(f"host-{cluster} printed no archive")

    def container(self, service: str) -> dict[str, Any]:
        """What the engine knows of a service's container."""
        number = self.compose("ps", "--all", "--quiet", service).strip()
        found: list[dict[str, Any]] = json.loads(run("docker", "inspect", number))
        return found[0]

    def refused(self, service: str, *command: str) -> bool:
        """Whether a command fails in a running container."""
        done = subprocess.run(
            [*self._base, "exec", "-T", service, *command], cwd=ROOT, capture_output=True, timeout=LIMIT_S
        )
        return done.returncode != 0


def ids_in(printed: str) -> list[int]:
    """The ids that `fedhlm ask --json` printed."""
    answer: dict[str, Any] = json.loads(printed.splitlines()[-1])
    ids: list[int] = answer["ids"]
    return ids


def run(
    *command: str,
    limit_s: float = LIMIT_S,
    check: bool = True,
    cwd: Path = ROOT,
    environ: dict[str, str] | None = None,
) -> str:
    """A command's standard output. Raises Trouble when it fails, with the end of what it said."""
    done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=limit_s)
    if check and done.returncode != 0:
        raise Trouble(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-3_000:]}")
    return done.stdout


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print how long the block took."""
    began_s = time.monotonic()
    yield
    print(f"{what:<44} {time.monotonic() - began_s:6.1f} s", flush=True)


def until(condition: Callable[[], bool], what: str) -> None:
    """Return once a condition holds. Raises Trouble after LIMIT_S."""
    end_s = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > end_s:
            raise Trouble(f"{what}: not within {LIMIT_S:g} s")
        time.sleep(0.2)


def require(holds: bool, what: str) -> None:
    """Say that something holds, or raise Trouble."""
    if not holds:
        raise Trouble(f"not so: {what}")
    print(f"  {what}", flush=True)


def oracle() -> tuple[list[int], str]:
    """What the large model alone writes: ids and text."""
    alone = Alone.load(model_folder("", "llm"), threads=1)
    ids = alone.write(alone.encode(TEXT), Sampling(SEED, TEMPERATURE, 1.0, "gumbel"), TOKENS)
    return ids, alone.decode(ids)


def images() -> None:
    """Print sizes; the agent's is limited."""
    base = size_of(BASE)
    for name in IMAGES:
        reference = f"{os.environ.get('IMAGES', 'fedhlm')}/{name}:{os.environ.get('VERSION', '0.1.0')}"
        size = size_of(reference)
        print(f"  image {reference:<37} {(size - base) / 1e6:6.0f} MB and the base")
        if name == "agent":
            most = f"{AGENT_MAX_BYTES / 1e6:.0f} MB"
            require(size - base <= AGENT_MAX_BYTES, f"the agent's image is at most {most} larger than its base")


def size_of(image: str) -> int:
    """Bytes of an image."""
    return int(run("docker", "image", "inspect", "--format", "{{.Size}}", image))


def walls(fleet: Fleet) -> None:
    """What a container cannot do."""
    reach = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)"
    port = "1883" if fleet.plain else "8883"
    require(not fleet.refused("agent-porch", "python", "-c", reach, "broker-home", port), "an agent reaches its broker")
    require(fleet.refused("agent-porch", "python", "-c", reach, "broker-cloud", port), "and not the cloud's")
    require(fleet.refused("agent-porch", "python", "-c", reach, "broker-garden", port), "nor another cluster's")
    reach_api = ("python", "-c", reach, "agent-shed", "11434")
    require(fleet.refused("agent-porch", *reach_api), "nor the other agent whose API is published")
    for agent in ("agent-porch", "agent-kitchen", "agent-pond"):  # with and without the network of published ports
        addresses = fleet.container("console")["NetworkSettings"]["Networks"].values()
        for address in (network["IPAddress"] for network in addresses):
            reach_page = ("python", "-c", reach, address, "8808")
            require(fleet.refused(agent, *reach_page), f"{agent} does not reach the console's page at {address}")
    require(fleet.refused("agent-porch", "touch", "/opt/fedhlm/x"), "it cannot write to its own image")
    require(fleet.compose("exec", "-T", "agent-porch", "id", "-u").strip() == "10001", "it is not root")
    if not fleet.plain:
        keys = fleet.compose("exec", "-T", "agent-porch", "sh", "-c", "find / -name '*.key' 2>/dev/null", check=False)
        require(keys.split() == ["/etc/fedhlm/tls/party.key"], "it sees one key, its own")
        require(fleet.refused("agent-porch", "touch", "/etc/fedhlm/tls/party.key"), "and cannot replace it")


def looked_at(fleet: Fleet) -> None:
    """What an operator sees: who is there, and what was asked."""
    said = fleet.compose("run", "--rm", "-T", "--entrypoint", "fedhlm", "ask-home", "status", limit_s=LIMIT_S)
    require(all(name in said for name in ("porch", "kitchen", "edge")), "`fedhlm status` shows the cluster's parts")
    logged = fleet.compose("logs", "--no-log-prefix", "agent-porch")
    require(re.search(LOGGED, logged) is not None, "an agent logs each request in one line")


def from_the_host(fleet: Fleet, expected: list[int]) -> None:
    """A program of the host asks over the published port."""
    with tempfile.TemporaryDirectory() as scratch:
        keys = Path(scratch, "keys", "home")
        keys.mkdir(parents=True)
        fleet.unpack("home", keys)
        require((keys / "party.key").stat().st_uid == os.getuid(), "the key belongs to who unpacked it")
        config = ROOT / "deploy" / "docker" / "host-home.toml"
        command = (sys.executable, "-m", "fedhlm_fleet.cli", "ask", "porch", TEXT, *OPTIONS, "--config", str(config))
        printed = run(*command, cwd=Path(scratch), environ={**os.environ, "PYTHONPATH": str(ROOT)})
        require(ids_in(printed) == expected, "a program of the host asks over the published port")


def over_http(fleet: Fleet, expected: str) -> None:
    """A program of the host asks an agent's API, with the key that was made for it and without one."""
    address = fleet.compose("port", "agent-porch", "11434").strip()
    require(address.startswith("127.0.0.1:"), "an agent's API is published for this machine alone")
    key = fleet.compose("exec", "-T", "agent-porch", "cut", "-d", " ", "-f", "2", f"/etc/fedhlm/tls/{API_KEYS}").strip()
    body = {"model": "fedhlm:exact", "prompt": TEXT, "max_tokens": TOKENS, "seed": SEED, "temperature": TEMPERATURE}

    def status_and_text(headers: dict[str, str]) -> tuple[int, str]:
        request = urllib.request.Request(
            f"http://{address}/v1/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json", **headers},
        )
        try:
            with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:  # noqa: S310 - the address is ours
                return answer.status, json.load(answer)["choices"][0]["text"]
        except urllib.error.HTTPError as exc:
            return exc.code, ""

    require(status_and_text({}) == (401, ""), "and asks for a key")
    require(status_and_text({"authorization": f"Bearer {key}"}) == (200, expected), "with which it writes the same")


def shown(fleet: Fleet) -> None:
    """The console's page shows the whole fleet to the host."""
    address = fleet.compose("port", "console", "8808").strip()
    require(address.startswith("127.0.0.1:"), "the console's page is published for this machine alone")

    def names() -> set[str]:
        with urllib.request.urlopen(f"http://{address}/state", timeout=LIMIT_S) as answer:
            state = json.load(answer)
        return {part["name"] for part in state["parts"] if part["online"]} if state["texts"] else set()

    until(lambda: names() >= {"porch", "kitchen", "shed", "pond"}, "the page shows agents of both clusters, and texts")
    print(f"  the page shows {', '.join(sorted(names()))}", flush=True)


def crash(fleet: Fleet, service: str) -> None:
    """Kill a service from inside and return when the engine has brought it back, well."""
    before = fleet.container(service)["State"]["StartedAt"]
    fleet.compose("exec", "-T", service, *DIE, check=False)

    def back() -> bool:
        state = fleet.container(service)["State"]
        return bool(state["StartedAt"] != before and state.get("Health", {}).get("Status") == "healthy")

    until(back, f"{service} is back")


def revoked(fleet: Fleet) -> None:
    """A client whose certificate is taken back is refused, and is told why; others go on."""
    fleet.compose("run", "--rm", "-T", "init", "fedhlm_fleet.cli", "pki", "revoke", "ask-garden", "--pki", "/pki")
    fleet.compose("run", "--rm", "-T", "init")
    fleet.compose("exec", "-T", "broker-garden", "sh", "-c", "kill -HUP 1")
    # The broker reads its files a moment after the signal.
    said: list[str] = []

    def refused() -> bool:
        try:
            fleet.ask("garden", "shed")
        except Trouble as exc:
            said.append(str(exc))
        return bool(said)

    until(refused, "the revoked client is refused")
    require("it has been revoked" in said[0], "a revoked client is refused, and told why")


def trial(fleet: Fleet) -> None:
    """Everything, in order. Raises Trouble at the first thing that is not as it should be."""
    fleet.compose("config", "--quiet")
    with timed("build"):
        run("docker", "pull", "--quiet", BASE, check=False)  # one that is here already will do
        fleet.compose("build", limit_s=1_800.0)
    images()
    with timed("up, until all are healthy"):
        fleet.compose("up", "--detach", "--wait")
    expected, text = oracle()
    with timed("a question over the bus"):
        found = fleet.ask("home", "porch")
    require(found == expected, f"porch writes what the large model writes alone: {len(expected)} tokens")
    require(fleet.ask("garden", "shed") == expected, "and so does shed in the other cluster")
    if fleet.third:
        require(fleet.ask("cellar", "vault") == expected, "and vault in the third")
    if fleet.host:
        from_the_host(fleet, expected)
    over_http(fleet, text)
    shown(fleet)
    looked_at(fleet)
    walls(fleet)
    for service in KILLED:
        with timed(f"{service} killed, until it is healthy again"):
            crash(fleet, service)
        with timed("  and a question"):
            found = fleet.ask("home", "porch")
        require(found == expected, "the answer is the same")
    with timed("up again, nothing changed"):
        fleet.compose("up", "--detach", "--wait")
    if not fleet.plain:
        said = fleet.compose("logs", "--no-log-prefix", "init").splitlines()
        issued = [line for line in said if ": issued until" in line]
        kept = [line for line in said if ": good until" in line]
        require(len(set(issued)) == len(issued) > 0, f"{len(issued)} certificates were issued, each once")
        require(len(kept) >= len(issued), "and kept when the init service ran again")
        revoked(fleet)
        require(fleet.ask("home", "porch") == expected, "the others go on")
    used = run("docker", "stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}}").splitlines()
    for line in sorted(line for line in used if line.startswith(fleet.project)):
        print(f"  {line.removeprefix(fleet.project + '-')}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trial with the overlays that are named; 0 when everything held."""
    parser = argparse.ArgumentParser(prog="compose-test", description=__doc__)
    parser.add_argument("overlays", nargs="*", help="compose.plain.yml, compose.scale.yml, ...")
    parser.add_argument("--keep", action="store_true", help="leave everything running")
    given = parser.parse_args(arguments)
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        print("compose-test needs Docker with Compose 2", file=sys.stderr)
        return 2
    os.environ.update(PORTS)
    fleet = Fleet(["docker-compose.yml", *given.overlays])
    try:
        trial(fleet)
    except (Trouble, subprocess.TimeoutExpired) as exc:
        print(f"compose-test: {exc}", file=sys.stderr)
        print(fleet.compose("ps", "--all", check=False), file=sys.stderr)
        print(fleet.compose("logs", "--tail", "20", check=False), file=sys.stderr)
        return 1
    finally:
        if not given.keep:
            with timed("down, with its volumes"):
                fleet.compose("--profile", "tools", "down", "--volumes", "--timeout", "20", check=False)
    label = f"label=com.docker.compose.project={fleet.project}"
    if not given.keep and (
        run("docker", "volume", "ls", "-q", "--filter", label) or run("docker", "ps", "-aq", "--filter", label)
    ):
        print("compose-test: something was left behind", file=sys.stderr)
        return 1
    print("everything held")
    return 0


if __name__ == "__main__":
    sys.exit(main())
