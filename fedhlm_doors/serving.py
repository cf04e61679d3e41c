"""Serves the APIs over HTTP beside a running part."""

import asyncio
import ipaddress
import logging
import re
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from fedhlm.answering import Answerer, Door
from fedhlm.errors import ConfigError
from fedhlm.process.descriptors import BACKLOG
from fedhlm.settings import Api
from fedhlm_doors.app import HttpApi
from fedhlm_doors.connections import DoorServer, limits
from fedhlm_doors.keys import ApiKeys, Rates
from fedhlm_doors.written import Pace

log = logging.getLogger(__name__)

KEY: Final = "api.listen"
CLOSE_S: Final = 2.0  # seconds in which open responses may end when the part stops
STUCK_S: Final = 10  # seconds after which uvicorn cancels what has not ended then
_ADDRESS: Final = re.compile(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^:\s]+)):([0-9]{1,5})\Z")


def address(listen: str, *, key: str = KEY) -> tuple[str, int]:
    """Return host and port of the setting `key`.

    Raises:
        ConfigError: it is not HOST:PORT.
    """
    found = _ADDRESS.match(listen)
    if found is None or int(found[3]) > 65_535:
        raise ConfigError(key, listen, "HOST:PORT")
    return found[1] or found[2], int(found[3])


def door_of(settings: Api) -> Door:
    """Return the door that a section of the settings describes. Entering it opens the port, which it yields.

    Raises:
        ConfigError: the address or the file of keys cannot be used, or an address that others can reach needs keys.
    """
    host, port = address(settings.listen)
    keys = ApiKeys.of(settings.keys)
    if not (keys.needed or _is_loopback(host)):
        raise ConfigError(KEY, settings.listen, "a loopback address unless api.keys is set")

    @asynccontextmanager
    async def door(answerer: Answerer) -> AsyncIterator[int]:
        api = HttpApi(answerer, keys, Rates(settings.rate, Pace().now_s))
        with listening(settings.listen, host, port) as listener:
            async with _served(api.app(), listener, CLOSE_S) as actual:
                log.info("serving the APIs of OpenAI and Ollama on %s port %d", host, actual)
                yield actual

    return door


@asynccontextmanager
async def page(app: ASGIApp, listen: str, *, key: str, published: bool = False) -> AsyncIterator[str]:
    """Serve an application to this machine only. Yields its address. `key` names the option `listen` in errors.

    With `published` the address may be any of this machine's, which is a container that others reach through a port of
    their own loopback address only.

    Raises:
        ConfigError: the address is not one of this machine's own, or is not free.
    """
    host, port = address(listen, key=key)
    if not (published or _is_loopback(host)):
        raise ConfigError(
            key, listen, "a loopback address; others reach it through ssh -L or a proxy that asks who they are"
        )
    with listening(listen, host, port, key=key) as listener:
        async with _served(app, listener, 0.0) as actual:  # a page that is open never ends
            yield f"http://{f'[{host}]' if ':' in host else host}:{actual}/"


@asynccontextmanager
async def _served(app: ASGIApp, listener: socket.socket, close_s: float) -> AsyncIterator[int]:
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=STUCK_S,
        **limits(),
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    server = DoorServer(config, close_s)
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="doors")
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await asyncio.wait([serving])


@contextmanager
def listening(listen: str, host: str, port: int, *, key: str = KEY) -> Iterator[socket.socket]:
    """A socket that listens at an address. `listen` is the setting, for the error.

    Raises:
        ConfigError: the address is not free.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family, backlog=BACKLOG) as listener:
            listener.setblocking(False)
            # Its connections inherit this. asyncio would set it on sockets of its own making only, and without it a
            # small chunk waits until the client has acknowledged the one before, which takes up to 40 ms.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield listener
    except OSError as exc:
        raise ConfigError(key, listen, "an address that is free on this machine", why=exc.strerror or str(exc)) from exc


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
