"""Tokens a second of the pipelines when the agent's link is slow: blocking, asynchronous and remote, side by side.

One agent talks to the broker through a TCP proxy that delays every byte by half of the given round trip each way; edge
and cloud are near. Run: python benchmarks/delay.py [--round-trips 0 50 200] [--prompts 6] [--tokens 64]
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import cloud_verifier.__main__ as cloud
import edge_agent.__main__ as agent
import edge_broker.__main__ as edge
from edge_broker.embedded import EmbeddedBroker
from fedhlm.bus.party import Received
from fedhlm.client import Client
from fedhlm.config import load
from fedhlm.protocol import topics
from fedhlm.protocol.messages import Presence
from fedhlm.telemetry import Counters
from fedhlm_lab.studies.command_line import COUNT, Parser, limited
from fedhlm_zoo.prompts import load_items
from fedhlm_zoo.shipped import with_agent_model, with_cloud_model

VARIANTS = {
    "hlm (blocking, 1 token)": {"preset": "hlm"},
    "blocking, 8 tokens": {"preset": "exact", "generation.pipeline.kind": "blocking"},
    "async (exact)": {"preset": "exact"},
    "tree, 64 nodes at most": {"preset": "exact", "generation.pipeline.kind": "tree"},
    "tree, 256 nodes at most": {
        "preset": "exact",
        "generation.pipeline.kind": "tree",
        "generation.pipeline.nodes": "256",
    },
    "llm-only (remote, 8 tokens)": {"preset": "llm-only"},
}


@asynccontextmanager
async def slow_link(port: int, one_way_s: float) -> AsyncIterator[int]:
    """A proxy to a local port that delays every byte by `one_way_s`, in order, without limiting the rate."""

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        async def release() -> None:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                writer.write(data)
                await writer.drain()

        releasing = asyncio.create_task(release(), name="release")
        try:
            while data := await reader.read(65_536):
                queue.put_nowait((loop.time() + one_way_s, data))
        finally:
            releasing.cancel()
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(forward(reader, far_writer), forward(far_reader, writer), return_exceptions=True)

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


async def measure(round_trip_s: float, flags: dict[str, str], prompts: int, tokens: int) -> dict[str, float]:
    """One agent's figures over `prompts` titles, one after the other."""
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(EmbeddedBroker())
        slow_port = await stack.enter_async_context(slow_link(broker.port, round_trip_s / 2))
        common = {"agent.threads": "1", "cloud.threads": "1", "agent.id": "porch", **flags}
        near = load(environ={}, flags={**common, "broker.url": broker.url})
        far = load(environ={}, flags={**common, "broker.url": f"mqtt://127.0.0.1:{slow_port}"})
        tasks = [
            asyncio.create_task(edge.run(near.config, Counters())),
            asyncio.create_task(cloud.run(with_cloud_model(near).config, Counters())),
            asyncio.create_task(agent.run(with_agent_model(far), Counters())),
        ]
        waiting = {"agent", "edge"}
        ready = asyncio.Event()

        def hear(received: Received) -> None:
            state = received.message
            if isinstance(state, Presence) and state.online and (state.role == "agent" or state.upstream):
                waiting.discard(state.role)
                if not waiting:
                    ready.set()

        client = await stack.enter_async_context(Client(broker.url, name="bench", cluster="home", hear=hear))
        await client.subscribe(
            topics.EDGE_STATUS.name(cluster="home"), topics.AGENT_STATUS.name(cluster="home", agent="porch")
        )
        all_up = asyncio.create_task(ready.wait())
        await asyncio.wait([all_up, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
        totals = {"tokens": 0.0, "wall_s": 0.0, "round_trips": 0.0, "uplink_bytes": 0.0, "discarded": 0.0}
        for number, item in enumerate(load_items()[:prompts]):
            began = time.perf_counter()
            result = await client.write("porch", item.title + "\n", max_tokens=tokens, seed=number)
            # The request's own way to the agent and back is the same for all and not what is compared.
            totals["wall_s"] += time.perf_counter() - began - round_trip_s
            totals["tokens"] += len(result.ids)
            for key in ("round_trips", "uplink_bytes", "discarded"):
                totals[key] += result.statistics[key]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    per_token = {f"{k}_per_token": totals[k] / totals["tokens"] for k in ("round_trips", "uplink_bytes", "discarded")}
    return {"tokens_per_second": totals["tokens"] / totals["wall_s"], **per_token}


def main() -> None:
    """Print a table and, last, JSON."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--round-trips", type=limited(float, 0.0, 60_000.0), nargs="+", default=[0.0, 50.0, 200.0], metavar="MS"
    )
    parser.add_argument("--prompts", type=COUNT, default=6)
    parser.add_argument("--tokens", type=COUNT, default=64)
    options = parser.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = {}
    for round_trip_ms in options.round_trips:
        print(f"round trip {round_trip_ms:g} ms added")
        for name, flags in VARIANTS.items():
            figures = asyncio.run(measure(round_trip_ms / 1000.0, flags, options.prompts, options.tokens))
            results.setdefault(f"{round_trip_ms:g}", {})[name] = figures
            print(f"  {name:28}" + "  ".join(f"{key} {value:.2f}" for key, value in figures.items()), flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
