"""`python -m fedhlm_fleet.container.ask AGENT TEXT`: a client that asks one agent over the bus and prints what it writes.

Broker, certificate and cluster come from the configuration (environment), as for the parts; --json prints one object.
"""

import argparse
import asyncio
import json
import os
import random
import sys
from collections.abc import Sequence
from typing import Any, Final

from fedhlm import config as configuration
from fedhlm.bus.party import Party, Stamp
from fedhlm.errors import BusError, FedhlmError, root_of
from fedhlm.process.run import bus_of
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Output, Presence, Prompt
from fedhlm.settings import Config
from fedhlm.telemetry import Counters, configure_logging

NAME: Final = "ask"


async def ask(config: Config, agent: str, text: str, asked: dict[str, Any], *, name: str) -> dict[str, Any]:
    """Wait until the agent is online, send it a prompt and collect its answer: text, ids, sources, finish, error.

    `asked` are fields of the prompt: max_tokens, seed, temperature, preset. `name` is the client's own.
    """
    broker, cluster = config.broker, config.cluster.name
    number = random.SystemRandom().getrandbits(32)
    bus = bus_of(broker, client_id=f"{name}-{number:08x}", connect_timeout_s=broker.connect_timeout_s)
    party = Party(bus=bus, stamp=Stamp(name), counters=Counters(), root=broker.root)
    prompt = Prompt(**party.stamp(), request=f"{name}-{number:08x}", text=text, **asked)
    status = topics.AGENT_STATUS.name(broker.root, cluster=cluster, agent=agent)
    output = topics.OUTPUT.name(broker.root, cluster=cluster, agent=agent)
    pieces: dict[int, Output] = {}
    sent = False
    async with bus:
        await bus.subscribe(status, output)
        async for received in party.received():
            match received.message:
                case Presence(online=True) if not sent:
                    await party.send(topics.PROMPT, prompt, cluster=cluster, agent=agent)
                    sent = True
                case Output(request=prompt.request) as piece:
                    if (answer := _whole(pieces, piece)) is not None:
                        return answer
    raise BusError("the bus closed before the answer was there")


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask once; 0 with an answer, 1 without one in time or with an error, 2 for what cannot be used."""
    parser = argparse.ArgumentParser(prog=NAME, description="Ask an agent over the bus.")
    parser.add_argument("agent", help="agent.id")
    parser.add_argument("text", help="what it is to continue")
    parser.add_argument("--preset", help="by default the agent's own")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, help="by default the agent's own")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    asked = {
        "max_tokens": given.tokens,
        "seed": given.seed,
        "temperature": given.temperature,
        "preset": given.preset,
    }
    try:
        loaded = configuration.load()
        configure_logging("WARNING", NAME, secrets=(loaded.config.broker.password,))
        answer = asyncio.run(_within(given.timeout, loaded.config, given.agent, given.text, asked))
    except (FedhlmError, BaseExceptionGroup) as exc:
        error = root_of(exc) if isinstance(exc, BaseExceptionGroup) else exc
        if not isinstance(error, FedhlmError):
            raise
        print(f"{NAME}: {error}", file=sys.stderr)
        return 1 if isinstance(error, BusError) else 2
    print(json.dumps(answer) if given.json else given.text + answer["text"])
    if answer["error"]:
        print(f"{NAME}: {given.agent} says: {answer['error']}", file=sys.stderr)
    return 1 if answer["finish"] == "error" else 0


async def _within(timeout_s: float, config: Config, agent: str, text: str, asked: dict[str, Any]) -> dict[str, Any]:
    name = os.environ.get("CLIENT_NAME", NAME)
    try:
        async with asyncio.timeout(timeout_s):
            return await ask(config, agent, text, asked, name=name)
    except TimeoutError:
        raise BusError(f"no whole answer of {agent} in {config.cluster.name} within {timeout_s:g} s") from None


def _whole(pieces: dict[int, Output], piece: Output) -> dict[str, Any] | None:
    """The answer, once nothing is missing before the piece that ends it; MQTT may bring pieces twice."""
    known = pieces.get(piece.position)
    if known is None or (known.finish is None and not known.ids):
        pieces[piece.position] = piece
    ids: list[int] = []
    sources: list[str] = []
    text = ""
    position = 0
    while (found := pieces.get(position)) is not None:
        ids += found.ids
        sources += [str(source) for source in found.sources]
        text += found.text
        if found.finish is not None:
            return {"text": text, "ids": ids, "sources": sources, "finish": found.finish, "error": found.error}
        if not found.ids:
            return None
        position += len(found.ids)
    return None


if __name__ == "__main__":
    sys.exit(main())
