"""The documentation site: built strictly, without the network, with every public module, and whole when opened from a disk."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Python runs this first, so that whatever wants to leave the machine fails.
OFFLINE = """
import socket

def refused(*arguments, **keywords):
    raise OSError("the build of the site wants the network")

socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refused
"""


def build(root: Path, site: Path, scratch: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of the repository in `root` into `site`, with every socket refused."""
    (scratch / "offline").mkdir()
    (scratch / "offline" / "sitecustomize.py").write_text(OFFLINE, "utf-8")
    environ = {**os.environ, "PYTHONPATH": f"{scratch / 'offline'}:{root}", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder / "site", folder)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def test_every_public_module_of_the_shared_packages_is_in_the_reference(site: Path) -> None:
    pages = "".join(page.read_text("utf-8") for page in (site / "reference").glob("*.html"))
    anchors = set(re.findall(r'id="([\w.]+)"', pages))
    paths = [*(ROOT / "fedhlm").rglob("*.py"), *(ROOT / "fedhlm_traces").glob("*.py")]
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in paths if not p.name.startswith("_")}
    assert "fedhlm.protocol.messages" in modules
    assert not modules - anchors


def test_the_reference_holds_messages_with_their_fields_and_every_command(site: Path) -> None:
    assert 'id="fedhlm.protocol.messages.Escalation.fixed"' in (site / "reference/fedhlm.protocol.html").read_text(
        "utf-8"
    )
    commands = (site / "reference/cli.html").read_text("utf-8")
    for command in ("agent", "edge", "cloud", "demo", "record", "replay", "trace-show", "doctor", "pki-issue", "flash"):
        assert f'id="fedhlm-{command}"' in commands, command


def test_every_file_is_listed_with_what_it_is(site: Path) -> None:
    page = (site / "reference/files.html").read_text("utf-8")
    rows = dict(re.findall(r"<td><code>([^<]+)</code></td>\s*<td>(.*?)</td>", page))
    assert len(rows) > 200
    assert not [path for path, summary in rows.items() if not summary]
    assert "fedhlm/protocol/messages.py" in rows


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    loads = re.compile(
        r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//|<link[^>]*\shref=["']?(?:https?:)?//"""
    )
    for page in site.rglob("*.html"):
        assert not loads.search(page.read_text("utf-8")), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(?:https?:)?//|@import", sheet.read_text("utf-8")), sheet


BROKEN = {
    "[gone](nowhere.md)": "'nowhere.md'",
    "[gone](budget.md#no-such-heading)": "'budget.md#no-such-heading'",
    "![gone](assets/none.png)": "'assets/none.png'",
}


def test_links_that_lead_nowhere_fail_the_build(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for name in ("docs", "fedhlm", "fedhlm_traces", "fedhlm_doors", "fedhlm_fleet"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, root)
    with (root / "docs" / "exactness.md").open("a", encoding="utf-8") as page:
        page.write("\n" + "\n\n".join(BROKEN) + "\n")
    done = build(root, tmp_path / "site", tmp_path)
    assert done.returncode != 0, done.stderr
    for target in BROKEN.values():
        assert f"exactness.md' contains a link {target}" in done.stderr


def test_every_page_of_the_folder_is_in_the_navigation() -> None:
    listed = set(re.findall(r"\S+\.md\b", (ROOT / "mkdocs.yml").read_text("utf-8")))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    records = {page for page in pages if re.match(r"decisions/\d{4}-", page)}
    assert not pages - records - listed
