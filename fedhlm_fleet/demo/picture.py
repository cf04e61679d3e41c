"""The picture of the README: the view and the closing table of a real run of the demo, as an SVG.

python -m fedhlm_fleet.demo.picture docs/assets/demo.svg
"""

import argparse
import asyncio
import io
import re
from pathlib import Path
from typing import Final

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console, Group, RenderableType
from rich.text import Text

from fedhlm import settings
from fedhlm.telemetry import configure_logging
from fedhlm_fleet.demo.progress import wrapped
from fedhlm_fleet.demo.report import Report, tables
from fedhlm_fleet.demo.run import Demo
from fedhlm_fleet.demo.story import outcome

WIDTH: Final = 112  # columns
LOOK_EVERY_S: Final = 0.25

# The fonts that rich loads from the web are removed; the reader's own monospaced font takes their place.
_FORMAT: Final = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


async def watch(demo: Demo) -> RenderableType:
    """Run the demo, and return the last view from the time when all agents wrote."""
    frame: RenderableType = Group()
    quiet = Console(file=io.StringIO(), width=WIDTH)
    running = asyncio.create_task(demo.run(quiet), name="demo")
    while not running.done():
        if demo.progress is not None and demo.progress.watched:
            frame = demo.progress.view()
        await asyncio.wait([running], timeout=LOOK_EVERY_S)
    await running
    return frame


def svg(command: str, frame: RenderableType, report: Report, confidence: float) -> str:
    """Draw the command, the view, the table and what came of it as one terminal."""
    console = Console(record=True, file=io.StringIO(), force_terminal=True, width=WIDTH, color_system="truecolor")
    console.print(Text(f"$ {command}", style="bold"))
    console.print(frame, Text(), *tables(report, WIDTH))
    for line in outcome(report, confidence):
        console.print(Text(wrapped(line, WIDTH, "- ")))
    return console.export_svg(title=command, code_format=_FORMAT, unique_id="demo")


def main() -> None:
    """Parse the command line, run the demo and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--preset", default=settings.DEFAULT_PRESET)
    parser.add_argument("--duration", type=float, default=30.0, help="seconds for which all agents write")
    given = parser.parse_args()
    configure_logging("ERROR", "picture")
    demo = Demo(preset=given.preset, prompts=None, tokens=64, seed=0, broker="", duration_s=given.duration)
    frame = asyncio.run(watch(demo))
    if demo.report is None:
        raise SystemExit("the demo ended without a report")
    given.out.write_text(svg("fedhlm demo", frame, demo.report, demo.config.generation.confidence), "utf-8")


if __name__ == "__main__":
    main()
