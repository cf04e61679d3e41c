"""`python -m fedhlm_fleet.container.console`: the console's page as the process of a container.

The command `fedhlm console` serves this machine only. Here the machine is the container, and its port is published on
the loopback address of the host. The page listens on one address of the container, that of the network through which
ports are published, so that other containers in the brokers' networks do not reach it. Prompts are never allowed.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fedhlm.errors import FedhlmError
from fedhlm.process.notify import Notifier
from fedhlm.process.run import address_of, serve
from fedhlm.spans import Tracer
from fedhlm.telemetry import Counters
from fedhlm_doors.serving import address
from fedhlm_fleet.console.page import NAME, show
from fedhlm_fleet.console.wiring import watch_of
from fedhlm_fleet.container import part
from fedhlm_fleet.container.healthy import FOLDER

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    """Serve the page until SIGTERM, save its health in the folder, and return the exit code: 2 if a word cannot be used."""
    parser = argparse.ArgumentParser(prog=NAME, description="The console of a fleet in a container.")
    parser.add_argument("--broker", action="append", required=True, help="URL of a broker; once for each cluster")
    parser.add_argument("--listen", required=True, help="HOST:PORT of the container on which the page is served")
    given = parser.parse_args(arguments)
    try:
        watch = watch_of(NAME, given.broker, None, {})
        for broker in watch.brokers:
            address_of(broker)
        address(given.listen, key="--listen")
    except FedhlmError as exc:
        print(f"{NAME}: {exc}", file=sys.stderr)
        return 2

    async def shown(_counters: Counters, notifier: Notifier, _tracer: Tracer) -> int:
        opened = partial(log.info, "serving the page on %s")
        return await show(watch, None, given.listen, opened=opened, published=True, notifier=notifier)

    def run() -> int:
        try:
            return serve(watch.settings, NAME, shown)
        except FedhlmError as exc:
            print(f"{NAME}: {exc}", file=sys.stderr)
            return 1

    return part.watched(run, folder)


if __name__ == "__main__":
    sys.exit(main())
