"""Targets that read files and words: configuration, state, recordings, addresses, presets, flags."""

import atexit
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final

import msgspec
import zstandard

from fedhlm import config
from fedhlm.bus.broker_url import BrokerUrl, TlsFiles
from fedhlm.errors import ConfigError, FedhlmError, ProtocolError, TraceError
from fedhlm.process import state
from fedhlm_fleet.commands.common import parse_keys
from fedhlm_traces.file import Header, Record, Writer, read
from fedhlm_traces.mosquitto import LineTally, records
from tests.fuzz import mutators
from tests.fuzz.mutators import Rng
from tests.fuzz.target import Target, refusing, require


@cache
def budget_config() -> config.Loaded:
    """The default preset."""
    return config.load(preset="budget", environ={})


@cache
def scratch() -> Path:
    """A folder for files under test; it goes with the process."""
    folder = tempfile.TemporaryDirectory(prefix="fedhlm-fuzz-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _config(data: bytes) -> None:
    path = scratch() / "config.toml"
    path.write_bytes(data)
    loaded = config.load(file=path, environ={})
    require(len(loaded.rows()) == len(config.KEYS), "a key is missing")


def _config_seed(rng: Rng) -> bytes:
    lines = [
        'preset = "budget"',
        "[generation]\ntau = 0.5\nseed = 7",
        "[generation.pipeline]\nwindow = 16\nblock = 4",
        '[broker]\nurl = "mqtts://u:p@host:1?ca=a"\nroot = "x/1"',
        "[edge.upstream]\nusername = 'x'",
        "[agent]\nid = 'a'\nthreads = 2",
        "generation.learning.optimiser = 'scaffold'",
        "a = [1, {b = 2}]",
        "x = 1979-05-27T07:32:00Z",
        "y = nan",
    ]
    return "\n".join(rng.sample(lines, rng.randrange(1, len(lines)))).encode()


def _state(data: bytes) -> None:
    folder = scratch() / "state"
    folder.mkdir(exist_ok=True)
    (folder / "kept").write_bytes(data)
    kept = state.load(folder, "kept")
    for path in folder.iterdir():
        path.unlink()
    if kept is None:
        raise ProtocolError("put aside")
    require(state.MAGIC in data and data.endswith(kept), "another payload than the file's")


@cache
def _state_seed_of(number: int) -> bytes:
    folder = scratch() / "seed"
    state.save(folder, "kept", b"payload" * number)
    return (folder / "kept").read_bytes()


def _text(decode: Callable[[str], object], *refusals: type[FedhlmError]) -> Callable[[bytes], bool]:
    return refusing(lambda data: decode(data.decode("utf-8", "surrogateescape")), *refusals)


def _url(text: str) -> None:
    url = BrokerUrl.parse(text)
    # Certificate files are looked for; there are none here.
    if url.files != TlsFiles():
        url.ssl_context()
    require(BrokerUrl.parse(str(url)).host == url.host, f"{url} is another host")
    require(not url.password or len(url.password) < 4 or url.password not in repr(url), "a password shows")


def _trace(data: bytes) -> None:
    path = scratch() / "fuzz.trace"
    path.write_bytes(data)
    records = list(read(path))
    require(all(isinstance(record, Record) for record in records), "something that is no record")


def _trace_content(data: bytes) -> None:
    """The frame after a valid header holds `data`."""
    _trace(_trace_header() + zstandard.ZstdCompressor(level=1).compress(data))


@cache
def _trace_header() -> bytes:
    path = scratch() / "header.trace"
    with Writer(path, Header(created_ms=0, source="fuzz")):
        pass
    return path.read_bytes()


def _records(rng: Rng) -> bytes:
    made = [
        Record(
            float(n), 10**12 + n, message.topic, message.payload, 1, False, "up", {"expiry_s": 3, "user": [["a", "b"]]}
        )
        for n, message in enumerate(mutators.valid(rng) for _ in range(rng.randrange(4)))
    ]
    return b"".join(msgspec.msgpack.encode(record) for record in made)


def _trace_seed(rng: Rng) -> bytes:
    return _trace_header() + zstandard.ZstdCompressor(level=1).compress(_records(rng))


def _mosquitto(data: bytes) -> None:
    for record in records(data.split(b"\n"), LineTally(), lossy=True):
        require(record.at_s >= 0.0, f"record {record!r}")


_LINES: Final = (
    b'{"tst":"2026-11-21T06:12:13.956164Z+0000","topic":"fedhlm/1/cloud/fl","qos":1,"retain":0,"payloadlen":2,"payload":"ab"}',
    b'{"tst":"2026-11-21T06:12:13Z","topic":"a","qos":0,"retain":1,"payloadlen":2,"properties":{"user-properties":{"a":"b"}}}',
    b'{"tst":1.5,"topic":"a","payload_hex":"00ff","payloadlen":2}',
)


_URLS: Final = (
    *(b"mqtt://h", b"mqtts://user:pass@host:8883?ca=a&cert=b&key=c", b"mqtt://[::1]:1883/", b"mqtt://u:%70%00@h:1"),
    *(
        b"mqtts://h?ca=%00",
        b"mqtt://%zz@h",
        b"mqtt://h:99999",
        b"mqtt://\xef\xbc\x8f/",
        b"mqtt://[",
        b"://",
        b"mqtt://h:\xd9\xa1",
    ),
)
_WORDS: Final = (b"--generation.seed\0007", b"--a=b\0--c-d=e", b"--\0x", b"--a\0--b", b"-x", b"--=\0", b"--a==\0")


def _preset(text: str) -> None:
    budget_config().with_preset(text)


def _preset_of_user(text: str) -> None:
    config.load(preset=text, environ={})


FILES: Final[dict[str, Target]] = {
    "config": Target(refusing(_config, ConfigError), _config_seed, 0.1),
    "state": Target(refusing(_state), lambda rng: _state_seed_of(rng.randrange(4)), 0.1),
    "trace": Target(refusing(_trace, TraceError), _trace_seed, 0.3),
    "trace-content": Target(refusing(_trace_content, TraceError), _records, 0.3, structured=True),
    "mosquitto": Target(
        refusing(_mosquitto, TraceError), lambda rng: b"\n".join(rng.choices(_LINES, k=rng.randrange(4)))
    ),
    "url": Target(_text(_url, ConfigError), lambda rng: rng.choice(_URLS)),
    "preset": Target(_text(_preset, ConfigError), lambda rng: rng.choice((b"budget", b"exact", b"hlm.toml")), 0.05),
    "preset-file": Target(_text(_preset_of_user, ConfigError), lambda _rng: b"budget", 0.05),
    "flags": Target(_text(lambda text: parse_keys(text.split("\0")), FedhlmError), lambda rng: rng.choice(_WORDS), 0.5),
}
