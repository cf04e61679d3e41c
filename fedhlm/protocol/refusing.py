"""The verdict that refuses a block."""

from typing import Any

from fedhlm.protocol.fields import MAX_REASON
from fedhlm.protocol.messages import Escalation, Verdict


def refused(header: dict[str, Any], block: Escalation | Verdict, reason: str) -> Verdict:
    """Make a verdict of status "refused" on a block, or in place of another verdict on it."""
    about: dict[str, Any] = {"session": block.session, "epoch": block.epoch, "base": block.base}
    return Verdict(**header, **about, status="refused", reason=reason[:MAX_REASON])
