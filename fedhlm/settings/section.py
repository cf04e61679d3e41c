"""The base class of a section of settings, and the masking of secrets."""

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from fedhlm.protocol import fields

MASK: Final = "***"

Unit = fields.Unit
WaitMs = Annotated[float, Meta(ge=0.0, le=60_000.0)]
Threads = Annotated[int, Meta(ge=0, le=256)]
BatchSize = Annotated[int, Meta(ge=1, le=fields.MAX_BATCH)]
GgufContext = Annotated[
    int,
    Meta(
        ge=1,
        le=1_048_576,
        description="Most tokens of a text of a GGUF file; what the model was trained for, if that is less. Memory for "
        "them is taken when a text needs it.",
    ),
]
# The providers of onnxruntime for Linux. Which of them a build has is known at run time only.
Provider = Literal[
    "CPUExecutionProvider",
    "CUDAExecutionProvider",
    "TensorrtExecutionProvider",
    "MIGraphXExecutionProvider",
    "OpenVINOExecutionProvider",
    "DnnlExecutionProvider",
    "XnnpackExecutionProvider",
    "ACLExecutionProvider",
    "QNNExecutionProvider",
]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A group of settings. Its repr masks passwords."""

    def __repr__(self) -> str:
        shown = (f"{name}={masked(name, getattr(self, name))!r}" for name in self.__struct_fields__)
        return f"{type(self).__name__}({', '.join(shown)})"


def is_secret(key: str) -> bool:
    """Whether a key is meant to hold a password, even if it is misspelt."""
    name = key.rpartition(".")[2]
    return name.startswith("pas") or "pwd" in name or "secret" in name


def masked(key: str, value: object) -> object:
    """Return a value to show: MASK in place of a password, and of an address that contains one."""
    text = str(value)
    return MASK if value and (is_secret(key) or ("://" in text and "@" in text)) else value
