"""What the HTTP door costs: time to the first token and between tokens over HTTP against the bus, and second turns.

    python benchmarks/doors.py --pairs 40 --conversations 12

One agent, its edge with a broker and a cloud run as processes on one thread each. The two ways take turns with the same
seeds in one run, and the figures are ratios: of medians, and the median of the ratios of pairs.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, NamedTuple

import httpx

from fedhlm.client import Client
from fedhlm_fleet.chaos.parts import free_port
from fedhlm_fleet.processes import Processes
from fedhlm_lab.studies.command_line import COUNT, Parser

PROMPT: Final = "Oil prices rise"
TEMPERATURE: Final = 0.8
HISTORY: Final = 395  # words of a conversation's first turn, a token each
READY_S: Final = 60.0
WORDS: Final = [
    "oil",
    "prices",
    "rise",
    "market",
    "shares",
    "fall",
    "company",
    "profit",
    "bank",
    "growth",
    "economy",
    "week",
    "report",
    "trade",
    "demand",
    "supply",
    "crude",
]


class Times(NamedTuple):
    """Seconds to the first token, and seconds a token after it."""

    first_s: float
    between_s: float


def times_of(began_s: float, heard: Sequence[tuple[float, int]]) -> Times:
    """The times of an answer whose pieces came at these moments with so many tokens."""
    later = sum(count for _, count in heard[1:])
    return Times(heard[0][0] - began_s, (heard[-1][0] - heard[0][0]) / max(1, later))


async def over_bus(client: Client, preset: str, seed: int, tokens: int) -> Times:
    """Ask over the bus."""
    began_s = time.perf_counter()
    answer = client.ask("porch", PROMPT, max_tokens=tokens, seed=seed, preset=preset, temperature=TEMPERATURE)
    heard = [(time.perf_counter(), len(piece.ids)) async for piece in answer if piece.ids]
    return times_of(began_s, heard)


async def over_http(http: httpx.AsyncClient, preset: str, path: str, body: dict[str, Any]) -> tuple[Times, str]:
    """Ask over HTTP; the times, and the text of a chat."""
    began_s, heard, text = time.perf_counter(), [], ""
    async with http.stream("POST", path, json={"model": f"fedhlm:{preset}", "stream": True, **body}) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                now_s, choice = time.perf_counter(), json.loads(line[6:])["choices"][0]
                text += choice.get("delta", {}).get("content") or ""
                if count := len(choice.get("fedhlm", {}).get("tokens", ())):
                    heard.append((now_s, count))
    return times_of(began_s, heard), text


async def pairs(client: Client, http: httpx.AsyncClient, preset: str, count: int, tokens: int) -> dict[str, float]:
    """HTTP against the bus."""

    async def door(seed: int) -> Times:
        body = {"prompt": PROMPT, "max_tokens": tokens, "seed": seed, "temperature": TEMPERATURE}
        return (await over_http(http, preset, "/v1/completions", body))[0]

    ways: dict[str, Callable[[int], Coroutine[Any, Any, Times]]] = {
        "bus": lambda seed: over_bus(client, preset, seed, tokens),
        "http": door,
    }
    found: dict[str, list[Times]] = {"bus": [], "http": []}
    for seed in range(count + 1):
        for name in sorted(ways, reverse=bool(seed % 2)):
            made = await ways[name](seed)
            if seed:  # the first one of each is not counted
                found[name].append(made)
    ratios = {}
    for place, name in enumerate(("first token", "between tokens")):
        bus, over = ([made[place] for made in found[way]] for way in ("bus", "http"))
        ratios[f"{name}, bus ms"] = 1_000.0 * statistics.median(bus)
        ratios[f"{name}, HTTP / bus"] = statistics.median(over) / statistics.median(bus)
        ratios[f"{name}, HTTP / bus by pairs"] = statistics.median(b / a for a, b in zip(bus, over, strict=True))
    return ratios


async def turns(http: httpx.AsyncClient, preset: str, count: int) -> dict[str, float]:
    """The first token of the second turn against that of the first, on a long history."""
    ratios, path = [], "/v1/chat/completions"
    for number in range(count):
        drawn = random.Random(f"{preset}{number}")
        messages = [{"role": "user", "content": " ".join(drawn.choice(WORDS) for _ in range(HISTORY))}]
        body = {"max_tokens": 16, "temperature": 0, "messages": messages}
        first, text = await over_http(http, preset, path, body)
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "And gold?"}]
        second, _ = await over_http(http, preset, path, body)
        ratios.append(second.first_s / first.first_s)
    return {"second turn / first turn": statistics.median(ratios)}


async def measured(options: Any) -> None:
    """Start the parts, ask, and print a line of JSON for each preset."""
    port, door = free_port(), free_port()
    broker, cli = f"mqtt://127.0.0.1:{port}", "fedhlm_fleet.cli"
    async with Processes() as parts:
        await parts.start("edge", cli, "edge", "--cluster.name", "home", "--edge.embedded-port", str(port))
        await parts.start("cloud", cli, "cloud", "--broker.url", broker, "--cloud.threads", "1")
        await parts.start(
            "agent", cli, "agent", "--agent.id", "porch", "--broker.url", broker, "--cluster.name", "home",
            "--agent.threads", "1", "--serve", f"127.0.0.1:{door}",
        )  # fmt: skip
        async with (
            Client(broker, name="bench", cluster="home") as client,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{door}", timeout=READY_S) as http,
        ):
            async with asyncio.timeout(READY_S):
                while not await up(client, http):
                    parts.check()
                    await asyncio.sleep(0.2)
            for preset in ("slm-only", "budget", "exact"):
                figures = await pairs(client, http, preset, options.pairs, options.tokens)
                figures |= await turns(http, preset, options.conversations)
                print(json.dumps({"preset": preset} | {name: round(value, 3) for name, value in figures.items()}))


async def up(client: Client, http: httpx.AsyncClient) -> bool:
    """Whether the door is open and the cloud verifies."""
    try:
        await http.get("/v1/models")
    except httpx.HTTPError:
        return False
    result = await client.write("porch", PROMPT, max_tokens=1, preset="exact")
    return set(result.sources) == {"cloud"}


def main() -> None:
    """Print figures as JSON."""
    parser = Parser(description=__doc__)
    parser.add_argument("--pairs", type=COUNT, default=40)
    parser.add_argument("--conversations", type=COUNT, default=12)
    parser.add_argument("--tokens", type=COUNT, default=64)
    asyncio.run(measured(parser.parse_args()))


if __name__ == "__main__":
    main()
