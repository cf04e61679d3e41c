"""Checks of the part on its machine: configuration, key files, state folder, model, runtime, decode speed."""

import errno
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter
from typing import Final, Literal, NamedTuple

from fedhlm.decoding.decoder import HASH_UP_TO_BYTES, DecoderInput
from fedhlm.decoding.gguf import SUFFIX
from fedhlm.decoding.invariance import TOLERANCE, block_difference, steadier
from fedhlm.decoding.models import described, load_model
from fedhlm.decoding.sampling import NOISE
from fedhlm.decoding.spoken import configured_target
from fedhlm.errors import FedhlmError
from fedhlm.peers.context_keys import PROJECTION_FILE, fitting_of, load_projection
from fedhlm.protocol.fingerprint import fingerprint_of
from fedhlm.protocol.roles import PartRole
from fedhlm.settings import Broker
from fedhlm_fleet.doctor.finding import CheckedModel, Remark, Subject, fail, ok, skip, warn
from fedhlm_fleet.doctor.machine import MIB
from fedhlm_fleet.doctor.served import model_on_server, on_server

SHIPPED: Final[dict[PartRole, Literal["slm", "llm"]]] = {"agent": "slm", "cloud": "llm"}
CPU: Final = "CPUExecutionProvider"
DISK_FAIL_MIB: Final = 8
DISK_WARN_MIB: Final = 64
WRITTEN_BYTES: Final = 256 * 1024
# Minimum tokens/s: people read about seven tokens a second, and a cloud verifies for many agents.
FLOORS: Final[dict[PartRole, float]] = {"agent": 10.0, "cloud": 30.0}
MEASURED_S: Final = 1.5
_DISK_ADVICE: Final = {
    errno.ENOSPC: "free some space: df -h, journalctl --vacuum-size=50M",
    errno.EDQUOT: "free some space, or raise this user's quota",
    errno.EROFS: "mount it writable; a failing SD card becomes read-only by itself: look at dmesg",
    errno.EIO: "the disk is failing: look at dmesg, and replace it",
}
MEASURED_TOKENS: Final = 128
ELSEWHERE: Final = "the model runs on a server, which the check `model` looks at"


class PartKeys(NamedTuple):
    """The configuration keys that agent, edge and cloud have in common."""

    model: str
    state: str
    threads: int


def part_of(subject: Subject) -> PartKeys:
    """Return the keys of this part's section; an edge has no model."""
    config = subject.config
    parts = {
        "agent": PartKeys(config.agent.model, config.agent.state, config.agent.threads),
        "edge": PartKeys("", config.edge.state, 1),
        "cloud": PartKeys(config.cloud.model, config.cloud.state, config.cloud.threads),
    }
    return parts[subject.role]


def brokers_of(subject: Subject) -> dict[str, Broker]:
    """Return the brokers to which this part connects, by the key of their section."""
    config = subject.config
    up = config.edge.upstream
    return {"broker": config.broker, **({"edge.upstream": up} if subject.traits.relays and up.url else {})}


def configuration(subject: Subject) -> Remark:
    """Check that the configuration can be read, and that its combination of broker URLs works."""
    if subject.problem is not None:
        return fail(str(subject.problem), "correct this key; `fedhlm config check` shows all keys and their sources")
    config = subject.config
    if subject.traits.relays and config.broker.url and config.edge.upstream.url:
        home, up = config.broker.address(), config.edge.upstream.address(key="edge.upstream.url")
        if (home.host, home.port) == (up.host, up.port):
            found = (
                f"edge.upstream.url and broker.url are one broker, {home}: two connections of one name end each other"
            )
            return fail(found, "leave edge.upstream.url empty: one broker then serves both sides")
    if subject.traits.relays and not config.broker.url and not config.edge.upstream.url:
        return warn(
            "neither broker.url nor edge.upstream.url is set",
            "set edge.upstream.url, unless the cloud connects to this edge's own broker",
        )
    changed = sum(source != "default" and not source.startswith("preset") for source in subject.sources.values())
    return ok(f"preset {config.preset}, {changed} keys set")


def key_files(subject: Subject) -> Remark:
    """Check that only the owner can read private keys and files with a password."""
    paths: dict[str, str] = {}
    for section, broker in brokers_of(subject).items():
        if broker.url and (key := broker.address(key=f"{section}.url").files.key):
            paths[key] = f"{section}.key"
        source = subject.sources[f"{section}.password"]
        if broker.password and source.startswith("file "):
            paths[source.removeprefix("file ")] = f"the file with {section}.password"
    if on_server(subject) and (key := subject.config.cloud.server.key):
        paths[key] = "cloud.server.key"
    for path, key in paths.items():
        try:
            with Path(path).open("rb"):
                facts = Path(path).stat()
        except OSError as exc:
            return fail(
                f"{key} {path} cannot be read ({exc.strerror})",
                f"run the doctor as root or as the service's user, or: sudo chown {subject.user_id} {path}",
            )
        if facts.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            return fail(
                f"{key} {path} has mode {stat.S_IMODE(facts.st_mode):04o}: others can read it",
                f"chmod 600 {path}, and replace it if others have had access",
            )
    return ok(f"{len(paths)} files, for their owner only") if paths else skip("no private keys or passwords in files")


def state_folder(subject: Subject) -> Remark:
    """Check the state folder by writing to it: permission bits do not show a full or read-only disk."""
    key = f"{subject.role}.state"
    configured = part_of(subject).state
    if not configured:
        return warn(
            f"{key} is empty: nothing learnt survives a restart",
            f"set {key} to a folder (under systemd: StateDirectory=)",
        )
    folder = Path(configured)
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        return fail(f"{nearest} is not a folder", f"set {key} to a folder")
    try:
        with tempfile.TemporaryFile(dir=nearest, prefix=".doctor-") as file:
            file.write(os.urandom(WRITTEN_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as exc:
        advice = _DISK_ADVICE.get(
            exc.errno or 0, f"give this user write access: sudo chown {subject.user_id} {nearest}"
        )
        return fail(f"{nearest} cannot be written ({exc.strerror})", advice)
    disk = os.statvfs(nearest)
    free = disk.f_bavail * disk.f_frsize // MIB
    found = f"{folder} is writable, {free} MiB free" + ("" if folder == nearest else f" (to be made in {nearest})")
    if free < DISK_WARN_MIB:
        say = fail if free < DISK_FAIL_MIB else warn
        return say(found, f"free some space: {DISK_WARN_MIB} MiB keep state files and logs safe")
    return ok(found)


def model(subject: Subject) -> Remark:
    """Check that the model folder is complete and unchanged, and that its model can be used."""
    if on_server(subject):
        return model_on_server(subject)
    from fedhlm_zoo.shipped import model_folder  # the image of an edge has no models, and not this package

    part = part_of(subject)
    key = f"{subject.role}.model"
    try:
        folder = model_folder(part.model, SHIPPED[subject.role])
        info, vocabulary = described(folder)
        if subject.traits.drafts and (target := subject.config.agent.target_tokenizer):
            vocabulary = configured_target(target).vocabulary
        fitting = fitting_of(folder) if subject.traits.drafts else ""
        space = load_projection(folder, info.hidden_size).digest[:8] if subject.traits.drafts and not fitting else ""
        fingerprint = fingerprint_of(*vocabulary, noise=NOISE, model=info.label)
    except FedhlmError as exc:
        return fail(str(exc), _another_copy(part.model, key))
    subject.model = CheckedModel(folder, info, fingerprint, space)
    whole = sum(file.bytes for file in info.files.values()) <= HASH_UP_TO_BYTES
    checked = "digests right" if whole else "sizes right (too large to hash)"
    found = f"{info.name}, {info.parameters / 1e6:.1f} M parameters, {info.quantisation}, {checked}"
    if fitting:
        return warn(f"{found}, no {PROJECTION_FILE}: peers are found badly", f"fit one: {fitting}")
    return ok(found)


def _another_copy(model: str, key: str) -> str:
    """What to do about a model that cannot be used."""
    if model.endswith(SUFFIX):
        return f"download the GGUF file again, or set {key} to another: this one is cut off, damaged or of another kind"
    return f"copy the folder again, or set {key} to one made by `fedhlm models export`"


def providers(subject: Subject) -> Remark:
    """Check that this build of onnxruntime has the configured execution providers."""
    try:
        import onnxruntime
    except ImportError as exc:
        return fail(f"onnxruntime cannot be imported: {exc}", f"pip install 'fedhlm[{subject.role}]'")
    available: list[str] = onnxruntime.get_available_providers()
    section = getattr(subject.config, subject.role)
    wanted = tuple(getattr(section, "providers", ()) or (CPU,))
    missing = [name for name in wanted if name not in available]
    found = f"{_short(wanted)} asked for, {_short(available)} available (onnxruntime {onnxruntime.__version__})"
    if missing:
        advice = f"install the onnxruntime that has {_short(missing)} (for NVIDIA: onnxruntime-gpu), or leave it out"
        return warn(f"{found}: falls back to {_short(n for n in wanted if n in available) or 'CPU'}", advice)
    return ok(found)


def _short(names: Iterable[str]) -> str:
    return ", ".join(name.removesuffix("ExecutionProvider") for name in names)


def speed(subject: Subject) -> Remark:
    """Measure the decode speed in tokens/s, one token at a time, as a device drafts and a cloud verifies at worst."""
    if on_server(subject):
        return skip(ELSEWHERE)
    if subject.model is None:
        raise AssertionError("the check `model` comes before")
    begun_s = perf_counter()
    try:
        decoder = load_model(subject.model.folder, threads=part_of(subject).threads)
    except FedhlmError as exc:
        return fail(str(exc), _another_copy(part_of(subject).model, f"{subject.role}.model"))
    loaded_s = perf_counter() - begun_s
    first = decoder.info.bos_id or 0
    result = decoder.forward([DecoderInput(decoder.empty_cache(), [first])])[0]  # the first call allocates
    count, begun_s = 0, perf_counter()
    while count < min(MEASURED_TOKENS, decoder.info.context - 2) and perf_counter() - begun_s < MEASURED_S:
        result = decoder.forward([DecoderInput(result.cache, [int(result.logits[-1].argmax())])])[0]
        count += 1
    rate = count / (perf_counter() - begun_s)
    floor = FLOORS[subject.role]
    found = f"{rate:.0f} tokens/s ({count} tokens), at least {floor:.0f} needed; loaded in {loaded_s:.1f} s"
    if rate < floor:
        key = f"{subject.role}.threads"
        return fail(
            found, f"use a smaller model, set {key} to the number of cores, or look for throttling and other load"
        )
    return ok(found)


def blocks(subject: Subject) -> Remark:
    """Check that the LLM's logits do not depend on how a text is cut into blocks; `exact` rests on that."""
    if on_server(subject):
        return skip(ELSEWHERE)
    if subject.model is None:
        raise AssertionError("the check `model` comes before")
    try:
        decoder = load_model(subject.model.folder, threads=part_of(subject).threads)
    except FedhlmError as exc:
        return fail(str(exc), _another_copy(part_of(subject).model, f"{subject.role}.model"))
    difference = block_difference(decoder)
    found = f"logits differ by at most {difference:.2g} between blocks of other sizes, {TOLERANCE:g} allowed"
    if difference > TOLERANCE:
        return warn(found, steadier(decoder.info))
    return ok(found)
