"""The names under which a device keeps what it learns: form of doubt or of asking, coupling, kind of law, pair of models."""

from typing import NamedTuple

from fedhlm.protocol.fields import Pair
from fedhlm.protocol.messages import Sampling
from fedhlm.settings import Generation


class Measures(NamedTuple):
    """The measures of a generation's two curves: that of its own drafts, and that of its peers' proposals."""

    draft: str
    peers: str


def measures_of(config: Generation, sampling: Sampling, pair: Pair) -> Measures:
    """The measures that belong to a configuration, a request, and the pair of models that generates."""
    kind = "greedy" if sampling.temperature == 0.0 else "sampled"
    if sampling.grammar is not None:
        kind += "-grammar"
    law = f"{sampling.coupling}/{kind}/{pair}"
    return Measures(f"{config.uncertainty}/{law}", f"{config.peers}/{law}")
