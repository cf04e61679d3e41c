"""Print what one part needs: the dependencies in pyproject.toml that no part has for itself, and those of the extras that are named
on the command line. A plain installation serves every part, an image one.
"""

import sys
import tomllib
from pathlib import Path

PARTS = ("agent", "edge", "cloud")

project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
extras = project["optional-dependencies"]
special = {requirement for part in PARTS for requirement in extras[part]}
shared = [requirement for requirement in project["dependencies"] if requirement not in special]
print("\n".join(dict.fromkeys([*shared, *(requirement for extra in sys.argv[1:] for requirement in extras[extra])])))
