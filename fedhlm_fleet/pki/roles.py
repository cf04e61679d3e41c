"""What a certificate can be for, apart from the rest because the command line wants it before anything heavy is loaded."""

from typing import Literal

# The roles of the topic table, and two that only certificates have: a broker, and who may read everything and write nothing.
CertificateRole = Literal["agent", "edge", "cloud", "client", "broker", "observer"]
