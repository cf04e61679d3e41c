"""Count the tokens of a fleet's texts that the LLM alone would not have written: with `exact`, none may differ.

One agent, one edge and the cloud run in the simulator on a pair of any models, and the LLM writes the same texts alone.
Prompts are a user's turns in the LLM's chat template; without a template they are the beginnings of texts. Run:
python benchmarks/exactness.py [--slm DIR|GGUF --llm DIR|GGUF] [--prompts chat_prompts.txt] [--texts 100] [--tokens 256]
"""

import json
import sys
from collections.abc import Sequence
from itertools import cycle, islice, zip_longest
from pathlib import Path

from edge_agent.result import Job
from fedhlm.config import load
from fedhlm.decoding.alone import Alone
from fedhlm.progress import progress
from fedhlm.settings import Generation
from fedhlm_fleet.pairing import prompts_of
from fedhlm_fleet.turns import speech_of
from fedhlm_lab.papers.workloads import read_prompts
from fedhlm_lab.sim import links
from fedhlm_lab.sim.shipped import shipped_pair
from fedhlm_lab.sim.virtual import run_virtual
from fedhlm_lab.sim.world import Fleet, Pair
from fedhlm_lab.studies.command_line import COUNT, TEMPERATURE, Parser, run
from fedhlm_zoo.shipped import model_folder

QUESTIONS = Path(__file__).parent / "chat_prompts.txt"


async def written(
    pair: Pair, generation: Generation, link: str, prompts: Sequence[list[int]], tokens: int
) -> list[list[int]]:
    """Let one agent write a text after each prompt; the seed of a text is its number."""
    fleet = Fleet(pair, seed=1, clusters=1, delay_s=0.0, sessions_max=8)
    for node in fleet.nodes.values():
        node.start()
    links.load(link).apply(fleet.link("agent-0"))
    texts: list[list[int]] = []

    async def unwatched(_tokens: object) -> None:
        return None

    with progress("texts of the fleet", len(prompts)) as ended:
        async with fleet.online("c0", "agent-0", pair.drafter()) as agent:
            for seed, prompt in enumerate(prompts):
                job = Job(generation, generation.sampling(seed), tokens, pair.context, pair.eos_ids)
                texts.append((await agent.generate(job, prompt, unwatched)).ids)
                ended()
    for node in fleet.nodes.values():
        await node.crash()
    return texts


def main() -> int:
    """Write all texts twice and print one line of JSON."""
    parser = Parser("exactness.py", __doc__)
    parser.add_argument("--slm", default="")
    parser.add_argument("--llm", default="")
    parser.add_argument("--target-tokenizer", default="")
    parser.add_argument("--preset", default="exact")
    parser.add_argument("--link", default="lte")
    parser.add_argument("--prompts", type=Path, default=QUESTIONS)
    parser.add_argument("--texts", type=COUNT, default=100)
    parser.add_argument("--tokens", type=COUNT, default=256)
    parser.add_argument("--temperature", type=TEMPERATURE, default=0.8)
    args = parser.parse_args()
    slm, llm = model_folder(args.slm, "slm"), model_folder(args.llm, "llm")
    flags = {"generation.temperature": f"{args.temperature:g}"}
    generation = load(preset=args.preset, environ={}, flags=flags).config.generation
    asked = list(islice(cycle(read_prompts(args.prompts)), args.texts))
    prompts = prompts_of(speech_of(llm), llm, asked, args.texts)
    pair = shipped_pair(slm, llm, target=args.target_tokenizer)
    texts = run_virtual(written(pair, generation, args.link, prompts, args.tokens))
    alone = Alone.load(llm, threads=1)
    tokens = unlike = whole = 0
    for seed, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        expected = alone.write(prompt, generation.sampling(seed), args.tokens)
        differing = sum(ours != theirs for ours, theirs in zip_longest(text, expected))
        tokens += len(expected)
        unlike += differing
        whole += not differing
    print(json.dumps({"texts": len(texts), "tokens": tokens, "unlike the LLM's": unlike, "whole texts": whole}))
    return 0


if __name__ == "__main__":
    sys.exit(run(main, "exactness.py"))
