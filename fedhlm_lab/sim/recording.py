"""Save a simulated run as a trace: its messages, and in the header the scenario that repeats it."""

import asyncio
from pathlib import Path
from typing import Final

import msgspec

from fedhlm.errors import TraceError
from fedhlm.protocol.topics import DEFAULT_ROOT
from fedhlm_lab.sim import toy
from fedhlm_lab.sim.invariants import Violation
from fedhlm_lab.sim.loopback_broker import Packet
from fedhlm_lab.sim.scenario import Scenario
from fedhlm_lab.sim.simulator import simulate
from fedhlm_lab.sim.world import WALL_S
from fedhlm_traces.file import Header, Record, Writer, direction_of, read

SOURCE: Final = "simulator"
_SCENARIO: Final = "scenario"


def save(path: Path, scenario: Scenario) -> Violation | None:
    """Run a scenario and write what its broker took; return the violation, if any.

    Raises:
        TraceError: the file exists or cannot be written.
    """
    records: list[Record] = []

    def tap(_sender: str, packet: Packet) -> None:
        now_s = asyncio.get_running_loop().time()
        expiry = {} if packet.deadline_s is None else {"expiry_s": packet.deadline_s - now_s}
        records.append(
            Record(
                at_s=now_s,
                wall_ms=round((WALL_S + now_s) * 1000.0),
                topic=packet.topic,
                payload=packet.payload,
                qos=packet.qos,
                retain=packet.retain,
                direction=direction_of(packet.topic, DEFAULT_ROOT),
                properties=expiry,
            )
        )

    failed = None
    try:
        simulate(scenario, tap=tap)
    except Violation as violation:
        failed = violation
    facts = {_SCENARIO: msgspec.to_builtins(scenario)}
    if failed is not None:
        facts["violation"] = {"name": failed.name, "text": failed.text, "at_s": failed.at_s}
    header = Header(
        created_ms=round(WALL_S * 1000.0),
        source=SOURCE,
        filters=("#",),
        fingerprints={"cloud": toy.FINGERPRINT} | dict.fromkeys(scenario.agent_names(), toy.FINGERPRINT),
        facts=facts,
    )
    with Writer(path, header) as writer:
        for record in records:
            writer.write(record)
    return failed


def scenario_of(path: Path) -> Scenario:
    """The scenario of a saved run.

    Raises:
        TraceError: not a recording, or not one of the simulator, or one of another version.
    """
    facts = read(path).header.facts
    if _SCENARIO not in facts:
        raise TraceError(f"{path} must be a trace saved by fedhlm simulate (it holds no scenario)")
    try:
        return msgspec.convert(facts[_SCENARIO], Scenario)
    except msgspec.ValidationError as exc:
        raise TraceError(f"{path}: its scenario cannot be used here: {exc}") from exc
