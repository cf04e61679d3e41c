"""A gate of one's own: it decides for every draft whether the cloud must verify it.

This one doubts the beginning of a text more than its end. It is put into the table of gates under the name of a shipped
one, because a configuration names the gates that it knows, and the rest of the agent stays as it is:

    python examples/own_gate.py --broker.url mqtt://127.0.0.1:1883 --agent.id porch
"""

import sys

from edge_agent.gate import GATES, Gate, Settings
from fedhlm.decoding.sampling import GATE_STREAM, uniform
from fedhlm_fleet.cli import main

FIRST = 16  # tokens, those of the prompt included


def early(settings: Settings) -> Gate:
    """Verify what is doubtful, the first tokens at half the threshold, and one draft in a hundred whatever its doubt."""

    def must_be_verified(uncertainty: float, position: int) -> bool:
        threshold = settings.threshold * (0.5 if position < FIRST else 1.0)
        audited = uniform(settings.seed, position, GATE_STREAM) < 0.01
        return audited or uncertainty > threshold

    return must_be_verified


GATES["threshold"] = early

if __name__ == "__main__":
    sys.exit(main(["agent", "--preset", "u-hlm", *sys.argv[1:]]))
