"""Clients take turns at an agent: who asks much waits for itself and not for others."""

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.requests import CLIENT_MAX, PROMPTS_MAX, Requests, RoutedPrompt
from fedhlm.bus.party import Stamp
from fedhlm.protocol.messages import Prompt

STAMPS = {name: Stamp(name) for name in ("hog", "ann", "bob", "cid")}


def prompt(client: str, number: int) -> RoutedPrompt:
    return RoutedPrompt("home", Prompt(**STAMPS[client](), request=f"{client}-{number}", text="x"))


def served(requests: Requests) -> list[str]:
    """The names of all requests in the order of their service."""
    names: list[str] = []
    while (request := requests.take_turn()) is not None:
        names.append(request.prompt.request)
        requests.close(request)
    return names


def test_one_client_s_many_prompts_make_another_wait_for_one_of_them() -> None:
    requests = Requests("porch")
    for n in range(CLIENT_MAX):
        assert requests.admit(prompt("hog", n)) is None
    assert requests.admit(prompt("ann", 0)) is None
    first = requests.take_turn()
    assert first is not None
    requests.close(first)
    assert requests.admit(prompt("bob", 0)) is None
    order = [first.prompt.request, *served(requests)]
    assert order.index("ann-0") <= 2
    assert order.index("bob-0") <= 3
    assert [name for name in order if name.startswith("hog")] == [f"hog-{n}" for n in range(CLIENT_MAX)]


def test_a_client_s_quota_leaves_room_for_others() -> None:
    requests = Requests("porch")
    ends = [requests.admit(prompt("hog", n)) for n in range(PROMPTS_MAX)]
    refused = [end for end in ends if end is not None]
    assert len(refused) == PROMPTS_MAX - CLIENT_MAX
    assert {end.refusal for end in refused} == {"busy"}
    assert "hog has" in refused[0].error
    assert requests.admit(prompt("ann", 0)) is None


@given(st.lists(st.sampled_from(sorted(STAMPS)), min_size=1, max_size=60))
def test_between_two_turns_of_a_client_every_other_one_that_waits_has_one(clients: list[str]) -> None:
    requests = Requests("porch")
    for n, client in enumerate(clients):
        requests.admit(prompt(client, n))
    order = [name.partition("-")[0] for name in served(requests)]
    assert sorted(order) == sorted(clients)
    left = {client: clients.count(client) for client in clients}
    since: dict[str, set[str]] = {}
    for client in order:
        if client in since:
            assert since[client] >= {c for c in left if left[c] and c != client}
        for others in since.values():
            others.add(client)
        since[client] = set()
        left[client] -= 1
