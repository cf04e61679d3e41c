"""The roles of certificates, in a module of their own: the command line needs them before it loads heavy libraries."""

from typing import Literal

# The roles of the topic table, and two of certificates only: broker, and observer, which reads all and writes nothing.
CertificateRole = Literal["agent", "edge", "cloud", "client", "broker", "observer"]
