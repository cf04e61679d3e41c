"""Ask an agent from Python, print its answer as it comes, and what it cost.

Start a fleet first (docs/tutorial, or: fedhlm edge & fedhlm cloud --broker.url mqtt://127.0.0.1 & fedhlm agent ...), then

    python examples/ask_from_python.py porch "Oil prices rise" --broker mqtt://127.0.0.1:1883
"""

import argparse
import asyncio
import sys

import fedhlm


async def ask(broker: str, agent: str, text: str, max_tokens: int) -> int:
    """Print the answer as it streams; 0 when it came whole."""
    async with fedhlm.Client(broker) as client, client.ask(agent, text, max_tokens=max_tokens) as answer:
        try:
            async for piece in answer:
                print(piece.text, end="", flush=True)
        except fedhlm.AgentOffline:
            print(f"{agent} is not there; is its service running?", file=sys.stderr)
            return 1
        except fedhlm.AskError as exc:  # lost pieces, a deadline, a refusal: what came is in answer.result
            print(f"\n{exc} (after {len(answer.result.ids)} tokens)", file=sys.stderr)
            return 1
        result = answer.result
    verified = sum(source == "cloud" for source in result.sources)
    print(f"\n{len(result.ids)} tokens, {verified} from the cloud, {result.statistics['uplink_bytes']:.0f} bytes up")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("agent")
    parser.add_argument("text")
    parser.add_argument("--broker", default="mqtt://127.0.0.1:1883")
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    sys.exit(asyncio.run(ask(given.broker, given.agent, given.text, given.tokens)))
