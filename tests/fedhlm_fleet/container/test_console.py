"""The console in a container: its page on one address of the container, and its health from its brokers."""

import asyncio
import signal
import sys
import time
from pathlib import Path

import httpx
import pytest

from edge_broker.embedded import EmbeddedBroker
from fedhlm_fleet.container import healthy
from fedhlm_fleet.container.console import main
from tests.brokers import free_port

LIMIT_S = 60.0
# Not a loopback address as the command knows it, and yet this machine's own: every test machine has it.
SOMEWHERE = "0.0.0.0"
RUN = "import sys; from pathlib import Path; from fedhlm_fleet.container.console import main; sys.exit(main(sys.argv[2:], Path(sys.argv[1])))"


async def until(folder: Path, said: str) -> None:
    async with asyncio.timeout(LIMIT_S):
        while healthy.complaint(folder, time.monotonic()) != said:  # noqa: ASYNC110 - the file tells nobody
            await asyncio.sleep(0.05)


async def test_the_page_is_served_on_an_address_of_the_container_and_health_follows_the_broker(tmp_path: Path) -> None:
    page, place = free_port(), free_port()
    words = ["--broker", f"mqtt://127.0.0.1:{place}", "--listen", f"{SOMEWHERE}:{page}"]
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", RUN, str(tmp_path), *words)
    try:
        await until(tmp_path, "no link to 127.0.0.1: trying again")
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{page}") as http:
            assert (await http.get("/state")).json()["parts"] == []
            assert (await http.get("/state", headers={"host": "page:8808"})).status_code == 403
            assert (await http.post("/ask", json={})).status_code == 404
            async with EmbeddedBroker("127.0.0.1", place):
                await until(tmp_path, "")
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), LIMIT_S) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def test_what_cannot_be_used_is_named_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, named in (
        (["--broker", "htp://x", "--listen", "127.0.0.1:0"], "broker.url must be mqtt://"),
        (["--broker", "mqtt://127.0.0.1:1", "--listen", "page"], "--listen must be HOST:PORT"),
    ):
        assert main(words, tmp_path) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"console: {named}")
