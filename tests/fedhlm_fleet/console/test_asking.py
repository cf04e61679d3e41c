"""Prompts from the console's form go over the bus to a real agent, and what becomes of them is told."""

import httpx
from httpx import ASGITransport

from fedhlm_doors.console import ConsolePage
from fedhlm_fleet.console.feeds import LiveFeed
from fedhlm_fleet.console.page import asker
from fedhlm_lab.sim import toy
from tests.fedhlm_fleet.console.test_page import state
from tests.field.fleet import LIMIT_S, both_brokers, fleets

AT = "http://127.0.0.1:8808"
OWN = {"origin": AT}
TEXT = toy.ToyTokenizer().decode([5, 6])


@both_brokers
async def test_the_form_asks_an_agent_over_the_bus_and_an_unknown_one_is_named(kind: str) -> None:
    async with fleets(kind) as [fleet]:
        client = await fleet.whole()

        async def posted(agent: str, *, answer_s: float) -> httpx.Response:
            page = ConsolePage(LiveFeed(state()), asker(client, answer_s=answer_s)).app()
            async with httpx.AsyncClient(transport=ASGITransport(page), base_url=AT) as http:
                return await http.post("/ask", json={"cluster": "home", "agent": agent, "text": TEXT}, headers=OWN)

        there = await posted("porch", answer_s=LIMIT_S)
        assert (there.status_code, there.json()) == (200, {}), there.text
        assert fleet.counters["agent home porch "]["verdicts"] > 0
        absent = await posted("attic", answer_s=0.5)
        assert absent.status_code == 502
        assert "attic" in absent.json()["error"]
