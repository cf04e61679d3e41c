"""Who is online, as the presences on the bus say."""

from typing import Literal

from fedhlm.bus.party import Stamp
from fedhlm.protocol.fingerprint import fingerprint_of
from fedhlm.protocol.messages import Presence
from fedhlm_fleet.attendance import Attendance, Place

PLACES = [Place("c0", "a"), Place("c0", "b"), Place("c1", "d")]
CLOUD = fingerprint_of("0" * 64, 16, noise="n", model="m")


def hear(fleet: Attendance, role: Literal["agent", "edge"], *, online: bool, sees: bool = False, **levels: str) -> None:
    upstream = CLOUD if sees else None
    fleet.hear(Presence(**Stamp("x")(), role=role, online=online, software="1", upstream=upstream), levels)


def test_a_fleet_is_complete_once_every_agent_is_online_and_every_edge_sees_the_cloud() -> None:
    fleet = Attendance()
    for place in PLACES:
        hear(fleet, "agent", online=True, cluster=place.cluster, agent=place.agent)
    hear(fleet, "edge", online=True, sees=True, cluster="c0")
    assert not fleet.complete(PLACES)
    hear(fleet, "edge", online=True, sees=False, cluster="c1")
    assert not fleet.complete(PLACES)
    hear(fleet, "edge", online=True, sees=True, cluster="c1")
    assert fleet.complete(PLACES)


def test_a_part_that_goes_offline_or_loses_the_cloud_is_missing_again() -> None:
    fleet = Attendance()
    hear(fleet, "agent", online=True, cluster="c1", agent="d")
    hear(fleet, "edge", online=True, sees=True, cluster="c1")
    assert fleet.complete(PLACES[2:])
    hear(fleet, "edge", online=False, sees=True, cluster="c1")
    assert not fleet.complete(PLACES[2:])
    hear(fleet, "edge", online=True, sees=True, cluster="c1")
    hear(fleet, "agent", online=False, cluster="c1", agent="d")
    assert not fleet.complete(PLACES[2:])
    hear(fleet, "agent", online=True, cluster="c1", agent="d")
    fleet.forget()
    assert not fleet.complete(PLACES[2:])
