"""Coverage-guided fuzzing of one target by atheris (libFuzzer): python -m tests.fuzz.atheris_run TARGET CORPUS [libFuzzer options].

The corpus begins with valid inputs of the target. `services` feeds agent, edge and cloud: a byte for the part, the topic's
name, a zero byte, the payload; an input is one message, and the world lives on through WORLD of them.
"""

import logging
import random
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import atheris

WORLD: Final = 2_000
SEEDS: Final = 200

# What is imported in this block is instrumented; the libraries below it are not ours to fuzz.
with atheris.instrument_imports(
    include=["fedhlm", "edge_agent", "edge_broker", "cloud_verifier", "fedhlm_traces", "fedhlm_fleet"],
    enable_loader_override=False,
):
    from fedhlm_lab.sim.virtual import VirtualLoop
    from tests.fuzz import mutators
    from tests.fuzz.services import Parts, no_tracebacks
    from tests.fuzz.targets import DECODERS


class Lasting(VirtualLoop):
    """A loop whose tasks live on from one run to the next, until `ending`."""

    ending = False

    def _wind_up(self) -> None:
        if self.ending:
            super()._wind_up()


class Services:
    """The services as one target."""

    def __init__(self) -> None:
        self._runs = 0
        self._loop: Lasting | None = None
        self._stack = ExitStack()
        self._caught: list[logging.LogRecord] = []
        self._parts = Parts(1)

    def __call__(self, data: bytes) -> None:
        """One message for one part."""
        if self._loop is None or self._runs % WORLD == 0:
            self._begin()
        assert self._loop is not None
        self._runs += 1
        names = sorted(self._parts.inboxes)
        name, _, payload = data[1:].partition(b"\0")
        message = mutators.Hostile(name.decode("utf-8", "surrogateescape"), payload)
        part = names[(data[0] if data else 0) % len(names)]
        self._loop.run_until_complete(self._one(part, message))

    async def _one(self, part: str, message: mutators.Hostile) -> None:
        await self._parts.put(part, message)
        await self._parts.rest()
        self._parts.check_sizes()
        if self._caught:
            raise AssertionError(f"a traceback was logged: {self._caught[0].getMessage()}")

    def _begin(self) -> None:
        if self._loop is not None:
            self._loop.ending = True
            self._loop.run_until_complete(self._parts.stop())
        self._stack.close()
        self._caught = self._stack.enter_context(no_tracebacks())
        self._parts = Parts(1)
        self._loop = Lasting()  # type: ignore[abstract]
        self._loop.run_until_complete(self._parts.start())


def _service_seed(rng: random.Random) -> bytes:
    name, payload = mutators.valid(rng)
    return bytes([rng.randrange(4)]) + name.encode() + b"\0" + payload


def main() -> None:
    """Fill the corpus, then hand over to libFuzzer, which ends the process."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    warnings.simplefilter("error")
    run: Callable[[bytes], object] = Services() if name == "services" else DECODERS[name].run
    seed = _service_seed if name == "services" else DECODERS[name].seed
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(1)
    for number in range(SEEDS):
        (folder / f"seed-{number}").write_bytes(seed(rng))
    found = f"-artifact_prefix={folder}/../{name}-"
    atheris.Setup([sys.argv[0], found, *sys.argv[3:], str(folder)], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
