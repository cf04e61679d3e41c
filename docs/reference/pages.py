"""Pages of the site that no file under docs/ holds: the Python reference, the commands, CONTRIBUTING.md and CHANGELOG.md.

A page of the reference lists every public module of its package, so a new module is documented from its first day.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]

# Package of each page; a page holds its own modules, not those of its subpackages.
PACKAGES = (
    "fedhlm",
    "fedhlm.protocol",
    "fedhlm.bus",
    "fedhlm.decoding",
    "fedhlm.learning",
    "fedhlm.peers",
    "fedhlm.process",
    "fedhlm.settings",
    "fedhlm.settings",
    "fedhlm_traces",
    "fedhlm_doors",
)

# Packages of the page of files, from the shared one to the tools.
TREES = (
    "fedhlm",
    "edge_agent",
    "edge_broker",
    "cloud_verifier",
    "fedhlm_doors",
    "fedhlm_traces",
    "fedhlm_lab",
    "fedhlm_fleet",
    "fedhlm_zoo",
)

COMMANDS = """# Commands

Exit status: 0 done, 1 not done as asked, 2 wrong usage or configuration, 130 interrupted.

::: cyclopts
    module: fedhlm_fleet.cli:app
    heading_level: 2
    recursive: true
    generate_toc: false
"""


def modules_of(package: str) -> Iterator[str]:
    """Dotted names of the package and of its public modules, in alphabetical order."""
    yield package
    for path in sorted((ROOT / package.replace(".", "/")).glob("*.py")):
        if not path.name.startswith("_"):
            yield f"{package}.{path.stem}"


def reference(package: str) -> str:
    """One page of the Python reference as Markdown."""
    return f"# {package}\n\n" + "".join(f"::: {module}\n\n" for module in modules_of(package))


def summary(path: Path) -> str:
    """The first sentence of a module's docstring, which may run over several lines."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n\n")[0].split())
    return re.split(r"(?<=[.:?]) (?=[A-Z])", text)[0].replace("|", "\\|")


def listing() -> str:
    """Every Python file of every package with its summary, as Markdown."""
    parts = ["# Files\n\nThe first sentence of every module's docstring.\n"]
    for package in TREES:
        paths = sorted((ROOT / package).rglob("*.py"))
        rows = [f"| `{path.relative_to(ROOT)}` | {summary(path)} |\n" for path in paths]
        parts.append(f"\n## {package}\n\n| file | what it is |\n|---|---|\n{''.join(rows)}")
    return "".join(parts)


def from_root(name: str) -> str:
    """A file of the repository's root, with its links as they are from docs/."""
    return (ROOT / name).read_text("utf-8").replace("](docs/", "](")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages (called by mkdocs)."""
    pages = {f"reference/{package}.md": reference(package) for package in PACKAGES}
    pages |= {"reference/cli.md": COMMANDS, "reference/files.md": listing()}
    pages |= {f"{name.lower()}.md": from_root(f"{name}.md") for name in ("CONTRIBUTING", "CHANGELOG")}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files
