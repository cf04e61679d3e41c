"""Earliest deadline first, within bounds: which of the blocks that wait for a call of the LLM goes first. No I/O.

A text that should get `pace` tokens a second is on time while its n-th token is there after n / pace seconds. The
deadline of a block is the time at which the last token that it may bring is due, counted from the text's first block.
Texts that are ahead therefore let others go first, whichever preset they run, and those that are behind catch up.

No text waits for an audit: it is due after half of the time for which its sender waits. Nothing starves, because
deadlines decide only among agents of which none has used CREDIT tokens more of the model than another one that waits.
"""

from typing import Final

from cloud_verifier.calls import BlockJob
from cloud_verifier.reports import patience_s
from cloud_verifier.sessions import TextStart

CREDIT: Final = 256.0  # tokens

Rank = tuple[float, float]
"""The place of a block in line; the lowest is served first."""


def due_s(job: BlockJob, start: TextStart | None, *, pace: float, id_bytes: int) -> float:
    """When the answer to a block is due at `pace` tokens a second. Ids take `id_bytes` bytes.

    A text of which the cloud holds nothing (`start` None) starts with this block.
    """
    if job.only_scores(id_bytes):
        return job.came_s + patience_s(job) / 2.0
    e = job.escalation
    began_s, base = start or TextStart(job.came_s, e.base)
    return began_s + (e.base + len(e.ids) // id_bytes + e.extend - base) / pace


def rank_of(ahead: float, due: float) -> Rank:
    """The rank of a block that is due at `due`, if its agent has used `ahead` tokens more than the least that waits."""
    return max(0.0, ahead - CREDIT), due
