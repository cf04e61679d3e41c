"""`python -m fedhlm_fleet.container.healthy`: a container's health check. What the part itself last said, if that is fresh.

Healthy means: the event loop turns and every broker that the part needs is connected. The last line says what is wrong.
"""

import sys
import time
from pathlib import Path
from typing import Final

from fedhlm.process.files import replace_file

FOLDER: Final = Path("/run/fedhlm")
STATUS: Final = "status"
SERVING: Final = "serving"

# A part speaks twice in this time, or whenever something changes.
SPAN_S: Final = 20.0


def note(folder: Path, status: str, now_s: float) -> None:
    """Keep what a part says; `now_s` is on the machine's monotonic clock, which all processes share."""
    replace_file(folder / STATUS, f"{now_s} {status}".encode())


def complaint(folder: Path, now_s: float) -> str:
    """What is wrong with the part; empty when it is well."""
    try:
        moment_s, _, status = (folder / STATUS).read_text("utf-8").partition(" ")
    except OSError:
        return "has not said anything yet"
    age_s = now_s - float(moment_s)
    if age_s > SPAN_S:
        return f"silent for {age_s:.0f} s, was: {status}"
    return "" if status == SERVING else status


def main(folder: Path = FOLDER) -> int:
    """Print what is wrong, or that nothing is; 0 when healthy."""
    wrong = complaint(folder, time.monotonic())
    print(wrong or SERVING)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
