"""What a program does to the world outside: the addresses that it speaks to and the files that it opens for writing.

Read from strace's own log, so that no library can be overlooked, whatever it is written in.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

STRACE = shutil.which("strace")
_CALLS: Final = "connect,sendto,sendmsg,sendmmsg,open,openat,creat,mkdir,mkdirat,rename,renameat,renameat2"
_CALL: Final = re.compile(r"^\d+ +(?P<name>\w+)\((?P<rest>.*)")
_INTERNET: Final = re.compile(r"sa_family=AF_INET6?, sin6?_port=htons\((?P<port>\d+)\).*?\"(?P<host>[^\"]+)\"")
_LOCAL: Final = re.compile(r"sa_family=AF_UNIX, sun_path=@?\"(?P<path>[^\"]*)\"")
_TEXT: Final = re.compile(r"\"([^\"]*)\"")
_WRITING: Final = re.compile(r"O_WRONLY|O_RDWR|O_CREAT")


class Outside(NamedTuple):
    """`spoken` holds "host:port" and "unix:path", `written` the paths that were made, replaced or opened for writing."""

    spoken: frozenset[str]
    written: frozenset[str]


def traced(log: Path, command: Sequence[str]) -> list[str]:
    """The command under strace, children and threads included; its log goes to a file."""
    assert STRACE is not None
    return [STRACE, "-f", "-qq", "-s", "4096", "-e", f"trace={_CALLS}", "-e", "signal=none", "-o", str(log), *command]


def outside(log: Path) -> Outside:
    """What the log tells."""
    spoken: set[str] = set()
    written: set[str] = set()
    for line in log.read_text("utf-8", errors="replace").splitlines():
        if (call := _CALL.match(line)) is None:
            continue
        name, rest = call["name"], call["rest"]
        spoken |= {f"{found['host']}:{found['port']}" for found in _INTERNET.finditer(rest)}
        spoken |= {f"unix:{found['path']}" for found in _LOCAL.finditer(rest)}
        if name.startswith(("mkdir", "rename", "creat")) or (name.startswith("open") and _WRITING.search(rest)):
            written |= set(_TEXT.findall(rest))
    return Outside(frozenset(spoken), frozenset(written))
