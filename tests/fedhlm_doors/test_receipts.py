"""Receipts: the LLM finds its own text, sees each token that is not, and a signature is of one receipt by one device."""

import asyncio
import datetime as dt
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from msgspec.structs import replace

from fedhlm.client import Client
from fedhlm.config import load
from fedhlm.decoding.alone import Alone
from fedhlm.decoding.grammar import of_regex
from fedhlm.errors import ConfigError, ReceiptError
from fedhlm.protocol.messages import Fingerprint, Grammar, Sampling
from fedhlm.receipts import Receipt, check_digests, differences, receipt_of, unsigned
from fedhlm.settings import Broker
from fedhlm_doors.signing import check_signature, signer_of
from fedhlm_fleet import cli
from fedhlm_zoo.shipped import model_folder
from tests.fedhlm_doors.house import PROMPT, SEED, House, house

LARGE = Fingerprint("t", 4_096, "n", "news")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def llm() -> Alone:
    return Alone.load(model_folder("", "llm"), threads=1)


def receipt(sampling: Sampling, prompt: list[int], ids: list[int]) -> Receipt:
    return receipt_of(sampling, LARGE, agent="porch", cluster="home", made_ms=1, prompt=prompt, ids=ids)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(3, 0.0, coupling="greedy"), Sampling(3, 0.8), Sampling(4, 1.3, 0.9, top_k=50, min_p=0.01)],
)
def test_the_llm_finds_its_own_text_and_each_token_that_is_not(llm: Alone, sampling: Sampling) -> None:
    prompt = llm.encode("Oil prices rise\n")
    ids = llm.write(prompt, sampling, 100)
    claim = receipt(sampling, prompt, ids)
    check_digests(claim, prompt, ids)
    assert list(differences(claim, prompt, ids, llm)) == []
    forged, place = [*ids], min(70, len(ids) - 2)
    forged[place] = 500 if ids[place] != 500 else 501
    found = list(differences(receipt(sampling, prompt, forged), prompt, forged, llm))
    assert found[0] == (place, forged[place], ids[place])
    with pytest.raises(ReceiptError, match="not about this text"):
        check_digests(claim, prompt, forged)
    with pytest.raises(ReceiptError, match="not about this prompt"):
        check_digests(claim, [*prompt, 9], ids)


def test_a_text_of_another_seed_or_law_differs(llm: Alone) -> None:
    prompt = llm.encode("Oil prices rise\n")
    ids = llm.write(prompt, Sampling(3, 0.8), 60)
    for other in (Sampling(4, 0.8), Sampling(3, 1.2), Sampling(3, 0.0)):
        assert list(differences(receipt(other, prompt, ids), prompt, ids, llm))
    held = Sampling(3, 0.8, grammar=Grammar(len(prompt), of_regex("[a-z ]{9}")))
    ids = llm.write(prompt, held, 60)
    assert not list(differences(receipt(held, prompt, ids), prompt, ids, llm))
    assert receipt(held, prompt, ids).sampling == held


def test_only_shared_noise_makes_a_text_a_function(llm: Alone) -> None:
    with pytest.raises(ReceiptError, match="coupling must be one with shared noise"):
        list(differences(receipt(Sampling(1, coupling="lattice"), [1], [2]), [1], [2], llm))


KEYS: dict[str, Any] = {
    "ec": lambda: ec.generate_private_key(ec.SECP256R1()),
    "rsa": lambda: rsa.generate_private_key(65_537, 2_048),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}


def issued(folder: Path, name: str, key: Any, ca: tuple[Any, x509.Certificate] | None = None) -> x509.Certificate:
    """A certificate in `folder`, of its own CA or of the given one."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    signer, issuer = (key, subject) if ca is None else (ca[0], ca[1].subject)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + dt.timedelta(days=1))
        .sign(signer, None if isinstance(signer, ed25519.Ed25519PrivateKey) else hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / f"{name}.crt").write_bytes(certificate.public_bytes(pem))
    (folder / f"{name}.key").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate


@pytest.mark.parametrize("kind", KEYS)
def test_a_signature_is_of_one_receipt_by_one_device_of_one_fleet(kind: str, tmp_path: Path) -> None:
    root = ec.generate_private_key(ec.SECP256R1())
    authority = root, issued(tmp_path, "ca", root)
    issued(tmp_path, "porch", KEYS[kind](), authority)
    issued(tmp_path, "stranger", ec.generate_private_key(ec.SECP256R1()))
    ca = (tmp_path / "ca.crt").read_bytes()

    def sign(name: str) -> Receipt:
        broker = Broker(cert=str(tmp_path / f"{name}.crt"), key=str(tmp_path / f"{name}.key"))
        return signer_of(broker)(receipt(Sampling(1), [1], [2]))

    signed = sign("porch")
    assert check_signature(signed, ca) == check_signature(signed, None) == "CN=porch"
    for change in ({"seed": 2}, {"text": "0"}, {"agent": "shed"}, {"made_ms": 2}):
        with pytest.raises(ReceiptError, match="signature is not one of this receipt"):
            check_signature(replace(signed, **change), ca)
    with pytest.raises(ReceiptError):
        check_signature(sign("stranger"), ca)
    with pytest.raises(ReceiptError, match="cannot be used"):
        check_signature(receipt(Sampling(1), [1], [2]), ca)
    with pytest.raises(ReceiptError, match="cannot be used"):
        check_signature(replace(signed, signature="!"), None)


def test_without_a_key_nothing_is_signed_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    assert signer_of(Broker()) is unsigned
    (tmp_path / "x").write_text("nothing")
    with pytest.raises(ConfigError, match=r"broker\.cert must be a certificate in PEM"):
        signer_of(Broker(cert=str(tmp_path / "x"), key=str(tmp_path / "x")))


# On running parts


@pytest.fixture(scope="module")
def doors() -> Iterator[House]:
    with house("edge", "cloud", "agent") as built:
        yield built


def verify(answer: Any, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    path = folder / "given.json"
    path.write_text(json.dumps(answer), "utf-8")
    command = [sys.executable, "-m", "fedhlm_fleet.cli", "verify-receipt", str(path), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_answers_of_exact_have_receipts_that_the_command_checks(doors: House, tmp_path: Path) -> None:
    url = doors.urls["agent"]
    asked = {"model": "fedhlm:exact", "prompt": PROMPT, "n": 2, "seed": SEED, "max_tokens": 24, "temperature": 0.8}
    answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=60).json()
    done = verify(answer, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("24 of 24 tokens are the LLM's own, not signed") == 2
    answer["choices"][1]["fedhlm"]["receipt"]["seed"] += 1
    done = verify(answer, tmp_path)
    assert done.returncode == 1
    assert "where the LLM writes" in done.stdout
    one = httpx.post(
        f"{url}/api/generate", json={"model": "fedhlm:exact", "prompt": PROMPT, "stream": False}, timeout=60
    ).json()
    assert verify(one, tmp_path).returncode == 0
    kept = httpx.post(f"{url}/v1/completions", json=asked | {"model": "fedhlm:slm-only", "n": 1}, timeout=60).json()
    done = verify(kept, tmp_path)
    assert done.returncode == 2
    assert "an answer with a receipt" in done.stderr
    broken: Any
    for broken in ([], {"choices": []}, "x", {"choices": [{"fedhlm": 1}]}):
        done = verify(broken, tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    streamed = httpx.post(f"{url}/v1/completions", json=asked | {"n": 1, "stream": True}, timeout=60).text
    chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    (last,) = (c["choices"][0]["fedhlm"] for c in chunks if "receipt" in c["choices"][0]["fedhlm"])
    assert last["receipt"]["text"] == answer["choices"][0]["fedhlm"]["receipt"]["text"]


@pytest.mark.slow
async def test_answers_over_the_bus_have_the_same_receipts(doors: House, tmp_path: Path) -> None:
    root = ec.generate_private_key(ec.SECP256R1())
    authority = root, issued(tmp_path, "ca", root)
    issued(tmp_path, "porch", ec.generate_private_key(ec.SECP256R1()), authority)
    path = tmp_path / "answer.json"
    words = ["agent", PROMPT, "--tokens", "12", "--seed", str(SEED), "--broker.url", doors.broker]
    asking = [sys.executable, "-m", "fedhlm_fleet.cli", "ask", *words, "--receipt", str(path), "--preset"]
    doors.sign = signer_of(Broker(cert=str(tmp_path / "porch.crt"), key=str(tmp_path / "porch.key")))
    try:
        done = await asyncio.to_thread(subprocess.run, [*asking, "exact"], capture_output=True, text=True, check=False)
    finally:
        doors.sign = unsigned
    assert done.returncode == 0, done.stderr
    answer = json.loads(path.read_bytes())
    assert done.stdout.rstrip("\n") == answer["text"].rstrip("\n")
    told = await asyncio.to_thread(verify, answer, tmp_path, "--ca", str(tmp_path / "ca.crt"))
    assert told.returncode == 0, told.stderr
    assert "12 of 12 tokens are the LLM's own, signed by CN=porch" in told.stdout
    answer["fedhlm"]["tokens"][3]["id"] += 1
    assert (await asyncio.to_thread(verify, answer, tmp_path)).returncode == 1

    # An answer that the LLM has not verified has none; the text comes all the same, and the file stays.
    done = await asyncio.to_thread(subprocess.run, [*asking, "slm-only"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the answer has no receipt" in done.stderr
    assert done.stdout.strip()
    assert json.loads(path.read_bytes()) != {}

    async with Client(doors.broker) as client:
        asked = {"max_tokens": 12, "seed": SEED, "preset": "exact"}
        result = await client.write("agent", PROMPT, receipt=True, **asked)
        body = {"model": "fedhlm:exact", "prompt": PROMPT, "max_tokens": 12, "seed": SEED}
        url = f"{doors.urls['agent']}/v1/completions"
        over_http = (await asyncio.to_thread(httpx.post, url, json=body, timeout=60)).json()["choices"][0]["fedhlm"]
        mine = json.loads(result.verifiable() or b"")["fedhlm"]
        assert mine["prompt_ids"] == over_http["prompt_ids"]
        differ = {key for key, value in mine["receipt"].items() if over_http["receipt"][key] != value}
        assert differ <= {"made_ms"}
        assert (await client.write("agent", PROMPT, **asked)).proof is None  # not asked for


def test_an_agent_signs_with_the_key_of_its_certificate_if_it_has_one(tmp_path: Path) -> None:
    issued(tmp_path, "porch", ec.generate_private_key(ec.SECP256R1()))
    made = receipt(Sampling(1), [1], [2])
    keys = {"broker.cert": str(tmp_path / "porch.crt"), "broker.key": str(tmp_path / "porch.key")}
    assert check_signature(cli._sign(load(environ={}, flags=keys))(made), None) == "CN=porch"
    assert cli._sign(load(environ={}))(made) is made
