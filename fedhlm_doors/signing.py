"""Signs receipts with a device's own key, and checks such signatures."""

import base64
import binascii
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from msgspec.structs import replace

from fedhlm.errors import ConfigError, ReceiptError
from fedhlm.receipts import Receipt, Sign, unsigned
from fedhlm.settings import Broker

log = logging.getLogger(__name__)

_HASH: Final = hashes.SHA256()


def signer_of(broker: Broker) -> Sign:
    """How receipts are signed: with `broker.key` and `broker.cert`, which name the device; not at all without them.

    Raises:
        ConfigError: one of the files cannot be used.
    """
    if not (broker.cert and broker.key):
        return unsigned
    certificate = _read(broker.cert, "broker.cert", x509.load_pem_x509_certificate, "a certificate in PEM")
    key: Any = _read(
        broker.key,
        "broker.key",
        lambda data: serialization.load_pem_private_key(data, None),
        "a private key in PEM, without a passphrase",
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM).decode()

    def sign(receipt: Receipt) -> Receipt:
        signature = base64.b64encode(_signature(key, receipt.body())).decode()
        return replace(receipt, certificate=pem, signature=signature)

    return sign


def check_signature(receipt: Receipt, ca: bytes | None) -> str:
    """Return who signed a receipt. `ca` is the PEM of the fleet's CA (None: any certificate counts).

    Raises:
        ReceiptError: the signature is wrong, or the CA did not issue its certificate.
    """
    try:
        certificate = x509.load_pem_x509_certificate(receipt.certificate.encode())
        signature = base64.b64decode(receipt.signature, validate=True)
        _verify(certificate.public_key(), signature, receipt.body())
        if ca is not None:
            certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca))
    except (ValueError, TypeError, binascii.Error) as exc:
        raise ReceiptError(f"the receipt's certificate or signature cannot be used: {exc}") from exc
    except InvalidSignature as exc:
        raise ReceiptError("the signature is not one of this receipt by this certificate, or of it by the CA") from exc
    return certificate.subject.rfc4514_string()


def _read(path: str, key: str, load: Callable[[bytes], Any], expected: str) -> Any:
    try:
        return load(Path(path).read_bytes())
    except (OSError, ValueError, TypeError) as exc:
        raise ConfigError(key, path, expected, why=str(exc)) from exc


def _signature(key: Any, data: bytes) -> bytes:
    match key:
        case ec.EllipticCurvePrivateKey():
            return key.sign(data, ec.ECDSA(_HASH))
        case rsa.RSAPrivateKey():
            return key.sign(data, padding.PKCS1v15(), _HASH)
        case ed25519.Ed25519PrivateKey():
            return key.sign(data)
    raise ConfigError("broker.key", type(key).__name__, "an EC, RSA or Ed25519 key")


def _verify(key: object, signature: bytes, data: bytes) -> None:
    match key:
        case ec.EllipticCurvePublicKey():
            key.verify(signature, data, ec.ECDSA(_HASH))
        case rsa.RSAPublicKey():
            key.verify(signature, data, padding.PKCS1v15(), _HASH)
        case ed25519.Ed25519PublicKey():
            key.verify(signature, data)
        case _:
            raise TypeError(f"a key of type {type(key).__name__}")
