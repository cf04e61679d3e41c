"""`python -m tests.mutants.run [PART_OF_A_RULE'S_NAME]`: make each change in a copy of the tree and see a test turn red.

Exit status 1 where a change goes unnoticed. About ten seconds a change.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mutants.change import Change
from tests.mutants.changes import CHANGES

ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "golden", "*.egg-info", "build", "dist")


def noticed(change: Change, copy: Path) -> bool:
    """Whether a test of the change's files fails in `copy`, which is put back afterwards."""
    file = copy / change.file
    text = file.read_text("utf-8")
    file.write_text(text.replace(change.before, change.after), "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *change.tests]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    finally:
        file.write_text(text, "utf-8")
    return done.returncode == 1 and "failed" in done.stdout


def main() -> int:
    """Go through the changes; the exit status."""
    wanted = " ".join(sys.argv[1:])
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        for change in CHANGES:
            if wanted in change.rule:
                red = noticed(change, copy)
                unnoticed += not red
                print(f"{'red' if red else 'UNNOTICED':>9}  {change.rule}: {change.file}", flush=True)
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
