"""A gate in CI: what a fleet decided when it was recorded is what today's code decides; else the build fails.

    python examples/replay_gate/gate.py recordings/

Each recording holds the journals of all parts: record your own fleet with `telemetry.journal` on (`fedhlm record`), or
`fedhlm demo --record recordings/demo.trace`. No broker and no device are needed to check one.
"""

import sys
from pathlib import Path

from fedhlm_fleet.cli import main


def failed(folder: Path) -> list[str]:
    """The names of the recordings in which something is decided differently today; all are checked."""
    recordings = sorted(folder.glob("*.trace"))
    if not recordings:
        raise SystemExit(f"no recording (*.trace) in {folder}")
    return [path.name for path in recordings if main(["replay", str(path), "--check", "all"]) != 0]


if __name__ == "__main__":
    different = failed(Path(sys.argv[1]))
    if different:
        sys.exit(f"decided differently: {', '.join(different)}")
