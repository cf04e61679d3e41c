"""Fresh recordings of the demo under every preset, each decided again: `python -m tests.fedhlm_traces.fresh --count 50`.

None may differ: the same code made both decisions. The exit status is 1 if one does.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fedhlm.config import presets

PROGRAM = (sys.executable, "-m", "fedhlm_fleet.cli")


def differs(preset: str, seed: int, seconds: float, tokens: int) -> str:
    """Record one demo and check it; what differs, empty if nothing does."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "fresh.trace"))
        given = ("--preset", preset, "--seed", str(seed), "--duration", str(seconds), "--tokens", str(tokens))
        subprocess.run([*PROGRAM, "demo", *given, "--record", file], capture_output=True, check=True)
        done = subprocess.run([*PROGRAM, "replay", file, "--check", "all"], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def main(arguments: Sequence[str] | None = None) -> int:
    """Record and check; print a line for each preset."""
    parser = argparse.ArgumentParser(prog="fresh", description=__doc__)
    parser.add_argument("--count", type=int, default=50, help="recordings of each preset")
    parser.add_argument("--preset", nargs="*", default=list(presets()), help="presets, by default all")
    parser.add_argument("--seconds", type=float, default=3.0, help="span of each recording")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of each text")
    given = parser.parse_args(arguments)
    failed = 0
    for preset in given.preset:
        found = [differs(preset, seed, given.seconds, given.tokens) for seed in range(given.count)]
        failed += sum(map(bool, found))
        print(f"{preset:<12} {given.count} recordings, {sum(map(bool, found))} differ", flush=True)
        for text in filter(None, found):
            print(text)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
