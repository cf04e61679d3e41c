"""The long run: as many spoilt messages as asked for over all decoders and services, with the counts that docs/fuzzing.md reports.

python -m tests.fuzz.run --count 1000000 --seed 1. It ends with status 1 if anything crashed, hung or grew.
"""

import argparse
import gc
import logging
import random
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from fedhlm_lab.sim.virtual import run_virtual
from tests.fuzz import mutators
from tests.fuzz.services import Parts, no_tracebacks
from tests.fuzz.target import Target, input_of
from tests.fuzz.targets import DECODERS

SERVICES_SHARE = 0.5
WORLD = 20_000  # messages for one life of the services
VALID = 0.25  # of the messages that services get
PROMPT_EVERY = 500
SLOW_S = 0.05  # for 64 KiB
SLOW_BYTES = 65_536


@dataclass
class Count:
    """What became of one target's inputs."""

    runs: int = 0
    taken: int = 0
    slowest_s: float = 0.0
    slowest: bytes = b""
    crashes: dict[str, bytes] = field(default_factory=dict)

    def row(self, name: str) -> str:
        """One line of the report."""
        cost = f"{self.slowest_s * 1e3:.1f} ms for {len(self.slowest)} bytes"
        return f"| {name} | {self.runs} | {self.taken} | {self.runs - self.taken} | {len(self.crashes)} | {cost} |"


def fuzz_decoder(target: Target, runs: int, rng: random.Random) -> Count:
    """Run one decoder on spoilt inputs."""
    count = Count()
    gc.collect()
    gc.freeze()  # else a collection of all that the services left would be counted as the cost of some input
    for _ in range(runs):
        data = input_of(target, rng)
        began = time.thread_time()
        try:
            count.taken += target.run(data)
        except Exception as exc:  # noqa: BLE001 - whatever escapes is what is looked for
            place = traceback.extract_tb(exc.__traceback__)[-1]
            count.crashes.setdefault(f"{type(exc).__name__} at {place.filename}:{place.lineno}: {exc}"[:400], data)
        took = time.thread_time() - began
        count.runs += 1
        if took > count.slowest_s:
            count.slowest_s, count.slowest = took, data
    return count


async def fuzz_services(runs: int, seed: int, counts: dict[str, Count]) -> None:
    """One life of agent, edge and cloud under attack; afterwards a valid prompt must be answered as the oracle does."""
    rng = random.Random(seed)
    parts = Parts(seed)
    await parts.start()
    for number in range(runs):
        message = mutators.valid(rng) if rng.random() < VALID else mutators.hostile(rng)
        part = parts.aim(rng, message)
        refused = parts.refused()
        took = await parts.put(part, message)
        count = counts.setdefault(f"service {part}", Count())
        count.runs += 1
        count.taken += parts.refused() == refused
        if took > count.slowest_s:
            count.slowest_s, count.slowest = took, message.payload
        await parts.rest()
        if number % PROMPT_EVERY == 0:
            await parts.disturb()
            parts.check_sizes()
    await parts.calm()
    parts.check_sizes()
    ids, finish = await parts.ask()
    if ids != parts.oracle() or finish is None:
        raise AssertionError(f"seed {seed}: answered {ids} ({finish}), the oracle says {parts.oracle()}")
    await parts.stop()


def rss_mib() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4_096 / 2**20


def main() -> int:
    """Run, report, and say whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=None, help="decoders by name, or 'services'")
    given = parser.parse_args()
    warnings.simplefilter("error")
    logging.getLogger().addHandler(logging.NullHandler())
    chosen = {name: t for name, t in DECODERS.items() if given.only is None or name in given.only}
    services = given.only is None or "services" in given.only
    for_services = round(given.count * (SERVICES_SHARE if chosen else 1.0)) if services else 0
    counts: dict[str, Count] = {}
    print(f"memory at the beginning: {rss_mib():.0f} MiB", flush=True)
    for world in range(-(-for_services // WORLD)):
        runs = min(WORLD, for_services - world * WORLD)
        with no_tracebacks():
            run_virtual(fuzz_services(runs, given.seed * 1_000 + world, counts))
        print(f"{(world + 1) * WORLD} messages for services, memory {rss_mib():.0f} MiB", flush=True)
    shares = sum(target.share for target in chosen.values())
    for name, target in chosen.items():
        runs = round((given.count - for_services) * target.share / shares)
        counts[name] = fuzz_decoder(target, runs, random.Random(f"{given.seed}/{name}"))
        print(f"{name}: {runs}, memory {rss_mib():.0f} MiB", flush=True)
    print("| target | inputs | taken | refused | crashes | slowest |\n|---|---|---|---|---|---|")
    for name, count in counts.items():
        print(count.row(name))
    bad = False
    for name, count in counts.items():
        for crash, data in count.crashes.items():
            print(f"CRASH {name}: {crash}\n  {data[:200]!r}")
            bad = True
        if count.slowest_s > SLOW_S and len(count.slowest) <= SLOW_BYTES:
            print(f"SLOW {name}: {count.slowest_s * 1e3:.1f} ms\n  {count.slowest[:200]!r}")
            bad = True
    print(f"total: {sum(count.runs for count in counts.values())}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
