"""A scenario as plain data: it determines the run, in any process, from the command line or a file."""

import shlex
from functools import cached_property
from typing import Final

import msgspec

from fedhlm.config import Loaded, load
from fedhlm_lab.sim import faults, links
from fedhlm_lab.sim.faults import Event, Targets
from fedhlm_lab.sim.links import LinkProfile

CLIENT: Final = "client"
STEP_S: Final = 0.05  # drafting a token and settling it, on the toy models
FAULTS_S: Final = 8.0


class Scenario(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A fleet, its requests and its faults. Agent `i` belongs to cluster `i % clusters`.

    `link` joins each agent to the broker, `upstream` each edge to the cloud. Faults end by `calm_s`; after it every
    link is good and every part is up. `settings` are KEY=VALUE over the preset's.
    """

    seed: int
    preset: str = "exact"
    agents: int = 4
    clusters: int = 2
    prompts: int = 2
    tokens: int = 16
    temperature: float = 0.8
    agreement: float = 0.7
    link: LinkProfile
    upstream: LinkProfile
    deadline_s: float = 600.0
    settings: tuple[str, ...] = ()
    schedule: tuple[Event, ...] = ()

    @cached_property
    def loaded(self) -> Loaded:
        """The configuration of every part.

        Raises:
            ConfigError: an unknown preset or key, or a bad value.
        """
        flags = {
            "generation.deadline_ms": str(round(self.deadline_s * 1000)),
            "generation.wait_offline": "true",  # the final checks must not depend on who was away
            "generation.retry_ms": str(round(self.retry_s * 1000)),
            # Drafting never pauses: more blocks in flight find more errors.
            "generation.pipeline.survival_floor": "0",
            **dict(setting.split("=", 1) for setting in self.settings),
        }
        return load(preset=self.preset, environ={}, flags=flags)

    @property
    def round_trip_s(self) -> float:
        """Round trip from an agent to the cloud without faults, in seconds."""
        return self.link.round_trip_s + self.upstream.round_trip_s

    @property
    def retry_s(self) -> float:
        """A block is sent again after this time; slow links need longer."""
        return max(0.5, 2.0 * self.round_trip_s)

    @property
    def calm_s(self) -> float:
        """When all faults are over: a number of round trips on every link, and at least FAULTS_S."""
        return FAULTS_S * max(1.0, self.round_trip_s)

    def cluster_of(self, number: int) -> str:
        """The cluster of an agent."""
        return f"c{number % self.clusters}"

    def agent_names(self) -> list[str]:
        """All agents."""
        return [f"agent-{number}" for number in range(self.agents)]

    def profile_of(self, client: str) -> LinkProfile:
        """A client's link without faults; an edge's cluster side, the cloud and the client are next to the broker."""
        if client.startswith("agent-"):
            return self.link
        return self.upstream if client.endswith("-up") else LAN

    def targets(self) -> Targets:
        """The possible targets of faults."""
        agents = self.agent_names()
        edges = [f"edge-c{c}" for c in range(self.clusters)]
        own = [(agent, f"edge-{self.cluster_of(i)}-down") for i, agent in enumerate(agents)]
        peers = [
            (a, b) for i, a in enumerate(agents) for j, b in enumerate(agents) if i < j and (j - i) % self.clusters == 0
        ]
        above = [(f"{edge}-up", "cloud") for edge in edges]
        neighbours = [(f"{a}-up", f"{b}-up") for a in edges for b in edges if a < b]
        asked = [(CLIENT, agent) for agent in agents]
        return Targets(
            links=(*agents, *(f"{edge}-{side}" for edge in edges for side in ("down", "up")), "cloud"),
            pairs=[faults.PAIR.join(pair) for pair in (*own, *peers, *above, *neighbours, *asked)],
            parts=(*agents, *(f"edge-{c}" for c in range(self.clusters)), "cloud"),
        )

    def with_faults(self, spec: str) -> "Scenario":
        """The same scenario with the schedule of a seed and a spec of faults.

        Raises:
            ConfigError: an unknown kind of fault, or an amount outside its limits.
        """
        events = faults.schedule(faults.parse(spec), self.targets(), seed=self.seed, calm_s=self.calm_s)
        return msgspec.structs.replace(self, schedule=events)


LAN: Final = links.load("lan")


def command(scenario: Scenario, *, link: str, upstream: str, spec: str) -> str:
    """The shell command that repeats a scenario's seed, given the words for its links and faults."""
    words = ["fedhlm", "simulate", "--preset", scenario.preset, "--agents", f"{scenario.agents}"]
    words += [
        "--clusters",
        f"{scenario.clusters}",
        "--prompts",
        f"{scenario.prompts}",
        "--tokens",
        f"{scenario.tokens}",
    ]
    words += ["--temperature", f"{scenario.temperature:g}", "--deadline", f"{scenario.deadline_s:g}"]
    words += ["--link", link, "--upstream", upstream, "--faults", spec, "--seeds", f"{scenario.seed}"]
    words += [word for setting in scenario.settings for word in ("--set", setting)]
    return shlex.join(words)
