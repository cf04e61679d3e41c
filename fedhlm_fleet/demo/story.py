"""The demo in words, for readers who know nothing of it: what happens now, when it first happens, and what came of it.

This module does no I/O.
"""

from collections.abc import Callable, Sequence
from typing import Final

from fedhlm import choices
from fedhlm.settings import Generation
from fedhlm_fleet.demo.journey import Journey
from fedhlm_fleet.demo.report import Figures, Report

MANY_TIMES: Final = 1.1  # from this ratio on, uplinks are told as differing


def setting(clusters: int, agents: int) -> str:
    """Say which parts there are, for `clusters` of `agents` each."""
    return (
        f"Each part is a process on this machine. {clusters * agents} agents are the devices, each with the small model "
        f"(SLM); every {agents} of them form a cluster around an edge. The cloud has the large model (LLM). "
        "They talk over an MQTT broker and nothing else."
    )


def task(generation: Generation, promise: str) -> list[str]:
    """Say what the agents do under a preset, by its promise and by how it decides."""
    told = [f"The preset promises: {promise}."] if promise else []
    if choices.GATES[generation.gate].by_doubt:
        told.append(
            "The SLM drafts each token and knows how unsure it is: its doubt u, from 0 to 1. A draft with a doubt up to "
            "the threshold tau is kept on the device. The others go to the cloud, where the LLM accepts or replaces them."
        )
    return told


class Narrator:
    """What is true of a journey, each sentence once, as soon as it is true."""

    def __init__(self, journey: Journey) -> None:
        self._journey = journey
        self._left = list(_BEATS)

    def news(self) -> list[str]:
        """Return the sentences that have become true since the last call."""
        told = {beat: words for beat in self._left if (words := beat(self._journey)) is not None}
        self._left = [beat for beat in self._left if beat not in told]
        return list(told.values())


def _first_round(journey: Journey) -> str | None:
    if not journey.learns or not journey.rounds:
        return None
    return (
        "The edges sum up what their agents learnt from the LLM's verdicts, and the cloud adds up the edges: the first "
        "federated round. Only sums travel, no text."
    )


def _first_kept(journey: Journey) -> str | None:
    tau = max(journey.taus, default=0.0)
    if not journey.learns or tau <= 0.0:
        return None
    return f"Enough is known now to keep drafts on the device: the first agent has raised its threshold to tau = {tau:.2f}."


def _first_peer(journey: Journey) -> str | None:
    if not journey.tokens["peer"]:
        return None
    return "Peers settle their first token: the LLM has judged their own drafts in similar contexts, and they agree."


def _first_neighbour(journey: Journey) -> str | None:
    if not journey.tokens["neighbour"]:
        return None
    return "The other cluster settles its first token: its verified tokens came over from edge to edge."


def _cut_off(journey: Journey) -> str | None:
    if not journey.tokens["unverified"]:
        return None
    return "The LLM does not answer in time: agents write on by themselves and mark those tokens as unverified."


def _within_budget(journey: Journey) -> str | None:
    limit = journey.limit
    if limit is None or limit > journey.budget:
        return None
    return (
        f"The certificate is below the budget for the first time: the error is at most {limit:.4f} per token "
        f"(at {journey.confidence:.0%}), and {journey.budget:g} is allowed."
    )


_BEATS: Final[tuple[Callable[[Journey], str | None], ...]] = (
    _first_round,
    _first_kept,
    _first_peer,
    _first_neighbour,
    _cut_off,
    _within_budget,
)


def outcome(report: Report, confidence: float) -> list[str]:
    """Say in words what the table says in figures."""
    if not report.tokens:
        return []
    below = 1.0 - (report.tokens_by_source["cloud"] + report.tokens_by_source["unverified"]) / report.tokens
    told = [f"{below:.0%} of {report.tokens:,} tokens were settled without the cloud, on the device or among peers."]
    if report.transmissions_saved is not None and report.uplink_messages_per_token:
        told.append(
            f"The agents sent {report.uplink_messages_per_token:.2f} messages per token to the cloud: "
            f"{report.transmissions_saved:.0%} less than one for every token."
        )
    told += _against_the_dearest(report.comparisons)
    told += [
        f"{c.preset} wrote the LLM's own text token for token, with {c.uplink_messages_per_token:.2f} messages per token."
        for c in report.comparisons
        if c.identical_to_llm == 1.0 and 0.0 < c.uplink_messages_per_token < 1.0 / MANY_TIMES
    ]
    if report.budget is not None and report.risk_limit is not None:
        kept = "within" if report.risk_limit <= report.budget else "not yet within"
        told.append(
            f"Keeping drafts costs an error of at most {report.risk_limit:.1%} per token, at {confidence:.0%} confidence: "
            f"{kept} the budget of {report.budget:.1%}."
        )
    return told


def _against_the_dearest(comparisons: Sequence[Figures]) -> list[str]:
    """Compare the uplink bytes of the run's own preset, the first, with the preset that sent most."""
    if not comparisons:
        return []
    own, dearest = comparisons[0], max(comparisons, key=lambda c: c.uplink_bytes_per_token)
    if not own.uplink_bytes_per_token or dearest.uplink_bytes_per_token < MANY_TIMES * own.uplink_bytes_per_token:
        return []
    times = dearest.uplink_bytes_per_token / own.uplink_bytes_per_token
    words = (
        f"For the same requests {own.preset} sent {own.uplink_bytes_per_token:,.0f} bytes per token to the cloud, and "
        f"{dearest.preset} {dearest.uplink_bytes_per_token:,.0f}: {times:,.0f} times as many."
    )
    return [words]
