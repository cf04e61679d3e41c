"""`python -m fedhlm_fleet.container.healthy`: the health check of a container, from the part's latest status.

A part is healthy if its event loop is running and every broker that it needs is connected. The printed line says what
is wrong.
"""

import sys
import time
from pathlib import Path
from typing import Final

from fedhlm.process.files import replace_file

FOLDER: Final = Path("/run/fedhlm")
STATUS: Final = "status"
SERVING: Final = "serving"

# A part reports its status twice in this time, and whenever something changes.
SPAN_S: Final = 20.0


def note(folder: Path, status: str, now_s: float) -> None:
    """Save the status of a part; `now_s` is on the machine's monotonic clock, which all processes share."""
    replace_file(folder / STATUS, f"{now_s} {status}".encode())


def complaint(folder: Path, now_s: float) -> str:
    """Return what is wrong with the part, or an empty text if it is healthy."""
    try:
        moment_s, _, status = (folder / STATUS).read_text("utf-8").partition(" ")
    except OSError:
        return "has not said anything yet"
    age_s = now_s - float(moment_s)
    if age_s > SPAN_S:
        return f"silent for {age_s:.0f} s, was: {status}"
    return "" if status == SERVING else status


def main(folder: Path = FOLDER) -> int:
    """Print what is wrong, or `serving`; return 0 if the part is healthy, else 1."""
    wrong = complaint(folder, time.monotonic())
    print(wrong or SERVING)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
