"""The roles of certificates and the properties of each.

They have a module of their own because the command line needs them before it loads heavy libraries.
"""

from typing import Final, Literal, NamedTuple

from fedhlm.protocol.roles import ROLES, Role, RoleTraits

# The roles of the topic table, and two of certificates only: broker, and observer, which reads all and writes nothing.
CertificateRole = Literal[Role, "broker", "observer"]


class CertificateTraits(NamedTuple):
    """Properties of a role of certificates.

    Attributes:
        party: the properties of the role on the bus.
        clusters: how many clusters its certificate names, from the first to the second number; None is any number.
        near: it uses the broker of a cluster.
        far: it uses the broker between edges and cloud.
        listens: it is a broker, whose certificate names its hosts.
        reads_all: it reads every topic and publishes on none.
    """

    party: RoleTraits = RoleTraits()
    clusters: tuple[int, int | None] = (0, None)
    near: bool = True
    far: bool = True
    listens: bool = False
    reads_all: bool = False


CERTIFICATES: Final[dict[CertificateRole, CertificateTraits]] = {
    "agent": CertificateTraits(ROLES["agent"], clusters=(1, None), far=False),
    "edge": CertificateTraits(ROLES["edge"], clusters=(1, 1)),
    "cloud": CertificateTraits(ROLES["cloud"], clusters=(0, 0), near=False),
    "client": CertificateTraits(ROLES["client"]),
    "operator": CertificateTraits(ROLES["operator"]),
    "broker": CertificateTraits(clusters=(0, 1), near=False, far=False, listens=True),
    "observer": CertificateTraits(clusters=(0, 0), reads_all=True),
}
