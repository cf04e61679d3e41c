# ruff: noqa: INP001
"""Print what pyproject.toml asks for: the base dependencies and those of the extras that are named on the command line."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
wanted = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in sys.argv[1:])]
print("\n".join(dict.fromkeys(requirement for group in wanted for requirement in group)))
