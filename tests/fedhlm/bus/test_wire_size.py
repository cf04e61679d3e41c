"""The bytes that documentation promises are the bytes on the wire."""

import pytest

from fedhlm.bus.interface import publish_wire_bytes
from fedhlm.protocol.codec import encode
from fedhlm.protocol.messages import Escalation
from fedhlm.protocol.packing import pack_ids
from fedhlm.protocol.topics import ESCALATE


@pytest.mark.parametrize("drafts", [1, 4, 8])
def test_a_block_costs_two_bytes_a_token_and_a_known_header(drafts: int) -> None:
    message = Escalation(
        version=1, sender="porch", sequence=300, sent_ms=1_800_000_000_000, session=2**32 - 1, epoch=5, base=90,
        ids=pack_ids([4_000] * drafts, 4_096), patience_ms=10_000, before=2**32 - 1,
    )  # fmt: skip
    payload = encode(message)
    bare = len(payload) - 2 * drafts
    assert bare == 43
    wire = publish_wire_bytes(ESCALATE.name(cluster="home", agent="porch"), len(payload), expiry_s=10.0)
    assert wire - 2 * drafts == 85
