"""`make fuzz`: coverage-guided runs of all targets or those that are named, one process each, and a table of what they did.

make fuzz ARGS="message services --seconds 600". Corpora stay in build/fuzz, so that the next run goes on from them.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.fuzz.targets import DECODERS

CORPORA: Final = Path("build") / "fuzz"
PAYLOAD_MAX: Final = 65_536
GRACE_S: Final = 120.0  # for the imports' instrumentation, and the last input


def main() -> int:
    """Run the targets; 1 if one of them crashed, hung or grew."""
    names = [*DECODERS, "services"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=names, help=f"of {', '.join(names)}")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--corpora", type=Path, default=CORPORA)
    given = parser.parse_args()
    unknown = sorted(set(given.targets) - set(names))
    if unknown:
        parser.error(f"targets must be among {', '.join(names)} (got {', '.join(unknown)})")
    failed = []
    print("| target | runs | code edges covered | inputs kept |\n|---|---|---|---|", flush=True)
    for name in given.targets:
        status, output = _guided(name, given.corpora / name, given.seconds)
        runs = re.findall(r"^Done (\d+) runs", output, re.MULTILINE)
        covered = re.findall(r"cov: (\d+) ft: \d+ corp: (\d+)", output)
        edges, kept = covered[-1] if covered else ("-", "-")
        print(f"| {name} | {runs[-1] if runs else 'failed'} | {edges} | {kept} |", flush=True)
        if status:
            failed.append(name)
            print(output[-4_000:], file=sys.stderr)
    return int(bool(failed))


def _guided(name: str, corpus: Path, seconds: int) -> tuple[int, str]:
    options = [f"-max_total_time={seconds}", f"-max_len={PAYLOAD_MAX}", "-timeout=5", "-rss_limit_mb=2048"]
    command = [sys.executable, "-m", "tests.fuzz.atheris_run", name, str(corpus), *options]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds + GRACE_S, check=False
    )
    return done.returncode, done.stdout.decode(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
