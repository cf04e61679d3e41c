"""A slow link between two network namespaces: two TUN devices, and every IP packet carried as a link profile says.

    python benchmarks/throughput/slow_link.py FAR NEAR nb-iot --seed 1

FAR has ADDRESSES[0], NEAR has ADDRESSES[1]. A packet from FAR takes the way up. It waits for those before it (rate),
arrives after the delay and a part of the jitter, never before an earlier one, or is lost (`resent`): TCP sends it again.
The kernel's netem does the same, but many kernels of containers have none. Needs root, iproute2 and /dev/net/tun.
"""

import ctypes
import fcntl
import heapq
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from fedhlm.errors import FedhlmError
from fedhlm_lab.sim import links
from fedhlm_lab.sim.links import LinkProfile
from fedhlm_lab.studies.command_line import COUNT, Parser
from fedhlm_lab.studies.command_line import run as run_study

ADDRESSES: Final = ("10.98.7.1", "10.98.7.2")
IP: Final = shutil.which("ip") or "/usr/sbin/ip"
DEVICE: Final = "slow0"
MTU: Final = 1_400
PACKET_MAX: Final = 65_536
NEW_NETWORK: Final = 0x40000000  # CLONE_NEWNET
SET_TUN: Final = 0x400454CA  # TUNSETIFF
TUN_WITHOUT_HEADER: Final = 0x1001  # IFF_TUN | IFF_NO_PI


class Way:
    """One direction: when each packet arrives. Times are in seconds on one clock. No I/O."""

    def __init__(self, profile: LinkProfile, bytes_per_s: float | None, seed: str) -> None:
        self._profile = profile
        self._bytes_per_s = bytes_per_s
        self._rng = random.Random(seed)
        self._free_s = 0.0
        self._last_s = 0.0

    def arrival_s(self, now_s: float, size_bytes: int) -> float | None:
        """When a packet sent now arrives; None if it is lost."""
        left_s = now_s
        if self._bytes_per_s is not None:
            left_s = self._free_s = max(now_s, self._free_s) + size_bytes / self._bytes_per_s
        if self._rng.random() < self._profile.resent:
            return None
        late_ms = self._profile.delay_ms + self._rng.random() * self._profile.jitter_ms
        self._last_s = max(self._last_s, left_s + late_ms / 1000.0)
        return self._last_s


def go_first(priority: int) -> None:
    """Run before all ordinary programs, so that the others on a busy machine are not measured too."""
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(priority))


@contextmanager
def entered(namespace: str) -> Iterator[None]:
    """Be in a named network namespace; what was opened there stays there."""
    libc = ctypes.CDLL(None, use_errno=True)
    own, other = os.open("/proc/self/ns/net", os.O_RDONLY), os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        if libc.setns(other, NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"the network namespace {namespace} cannot be entered")
        yield
    finally:
        libc.setns(own, NEW_NETWORK)
        os.close(own)
        os.close(other)


def tun(namespace: str, own: str, other: str) -> int:
    """Open a TUN device in a namespace, joined to the other address."""
    with entered(namespace):
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, SET_TUN, struct.pack("16sH22x", DEVICE.encode(), TUN_WITHOUT_HEADER))
    for line in (f"addr add {own} peer {other} dev {DEVICE}", f"link set {DEVICE} mtu {MTU} up"):
        subprocess.run([IP, "-n", namespace, *line.split()], check=True)
    return device


def carry(devices: tuple[int, int], ways: tuple[Way, Way]) -> None:
    """Carry packets for ever. `select` keeps time to a tenth of a millisecond, where an event loop keeps one."""
    waiting: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        wait_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable, _, _ = select.select(devices, (), (), wait_s)
        now_s = time.monotonic()
        while waiting and waiting[0][0] <= now_s:
            _, _, device, packet = heapq.heappop(waiting)
            os.write(device, packet)
        for device in readable:
            side = devices.index(device)
            packet = os.read(device, PACKET_MAX)
            if (arrival_s := ways[side].arrival_s(now_s, len(packet))) is not None:
                number += 1
                heapq.heappush(waiting, (arrival_s, number, devices[1 - side], packet))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line until a signal."""
    parser = Parser(prog="slow_link.py", description=__doc__)
    parser.add_argument("far")
    parser.add_argument("near")
    parser.add_argument("profile")
    parser.add_argument("--seed", type=COUNT, default=1)
    options = parser.parse_args(arguments)
    profile = links.load(options.profile, key="profile")
    go_first(2)
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
    try:
        devices = (tun(options.far, *ADDRESSES), tun(options.near, *reversed(ADDRESSES)))
    except (OSError, subprocess.CalledProcessError) as exc:
        raise FedhlmError(f"the slow link needs root, iproute2 and /dev/net/tun: {exc}") from exc
    rates = (profile.up_bytes_per_s, profile.down_bytes_per_s)
    up, down = (Way(profile, rate, f"{options.seed}/{rate}/{i}") for i, rate in enumerate(rates))
    print("ready", flush=True)
    carry(devices, (up, down))
    return 0


if __name__ == "__main__":
    sys.exit(run_study(main, "slow_link.py"))
