"""The checks of each part in their order, with the checks that each one needs and its deadline."""

from functools import partial
from typing import Final

from fedhlm_fleet.doctor import broker, local, machine, others
from fedhlm_fleet.doctor.finding import Check, Subject

CONFIGURED: Final = "configuration"
# Deadlines for reading and hashing a large model folder from an SD card, for loading and measuring, and for the
# network.
MODEL_S: Final = 5.0
SPEED_S: Final = 9.0
NETWORK_S: Final = 4.0


def _broker(key: str) -> tuple[Check, ...]:
    """Return the checks of one broker, from the host name to the delay; most need an earlier one."""
    return (
        Check(f"{key} host", partial(broker.host_name, key=key), (CONFIGURED,), NETWORK_S),
        Check(f"{key} port", partial(broker.port, key=key), (f"{key} host",), NETWORK_S),
        Check(f"{key} TLS", partial(broker.certificate, key=key), (f"{key} port",), NETWORK_S),
        Check(f"{key} own cert", partial(broker.own_certificate, key=key), (CONFIGURED,), NETWORK_S),
        # The login comes after TLS, whose errors are more precise than those of a failed login.
        Check(f"{key} login", partial(broker.login, key=key), (f"{key} TLS",), 2 * NETWORK_S),
        Check(f"{key} rights", partial(broker.rights, key=key), (f"{key} login",), 2 * NETWORK_S),
        Check(f"{key} delay", partial(broker.delay, key=key), (f"{key} rights",), 2 * NETWORK_S),
    )


_MACHINE: Final = (
    Check("system", machine.system),
    Check("processor", machine.processor),
    Check("python", machine.python),
    Check("libraries", machine.libraries),
    Check("clock", machine.clock),
    Check(CONFIGURED, local.configuration),
    Check("key files", local.key_files, (CONFIGURED,)),
    Check("state folder", local.state_folder, (CONFIGURED,)),
)
_MEMORY: Final = Check("memory", machine.memory)
_MODEL: Final = (
    Check("model", local.model, (CONFIGURED,), MODEL_S),
    Check("providers", local.providers, (CONFIGURED,), MODEL_S),
    _MEMORY,
    Check("decode speed", local.speed, ("model", "providers"), SPEED_S),
)

_AGENT: Final = (
    *_MACHINE,
    *_MODEL,
    *_broker("broker"),
    Check("edge", others.edge, ("broker rights",)),
    Check("agreement", others.agreement_of_agent, ("model", "edge")),
    Check("others' clocks", others.clocks, ("broker rights",)),
)
_CLOUD: Final = (
    *_MACHINE,
    *_MODEL,
    Check("blocks", local.blocks, ("model", "providers"), SPEED_S),
    *_broker("broker"),
    Check("agreement", others.agreement_of_cloud, ("model", "broker rights")),
    Check("others' clocks", others.clocks, ("broker rights",)),
)


def _edge(home: str, up: str) -> tuple[Check, ...]:
    """Return the checks of an edge with the keys of its two brokers, which may be one."""
    return (
        *_MACHINE,
        _MEMORY,
        *(check for key in dict.fromkeys((home, up)) for check in _broker(key)),
        Check("cloud", others.cloud, (f"{up} rights",)),
        Check("agreement", others.agreement_of_edge, ("cloud", f"{home} rights"), NETWORK_S),
        Check("others' clocks", others.clocks, (f"{up} rights",)),
    )


def checks_of(subject: Subject) -> tuple[Check, ...]:
    """Return the checks of this part."""
    has_two = subject.loaded is not None and bool(subject.config.edge.upstream.url)
    return {"agent": _AGENT, "cloud": _CLOUD, "edge": _edge("broker", broker.UPSTREAM if has_two else "broker")}[
        subject.role
    ]
