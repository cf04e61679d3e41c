"""`fedhlm verify-receipt`: check with the LLM that an answer is its own text."""

import json as jsons
from pathlib import Path
from typing import Annotated, Any, Final

from cyclopts import Parameter

from fedhlm.errors import ConfigError, ReceiptError
from fedhlm_fleet.commands.common import needing

FAILED: Final = 1
SHOWN: Final = 5  # differing tokens that are named


def verify_receipt(
    answer: Path,
    *,
    model: str = "",
    ca: Path | None = None,
    threads: int = 1,
    json: Annotated[bool, Parameter(negative="", show_default=False)] = False,
) -> int:
    """Write an answer again with the LLM, and say whether it is the LLM's own text.

    ANSWER is the JSON of an answer that was not streamed, as curl prints it, or a file of fedhlm ask --receipt. Each
    choice is checked.
    Exit code 0: every token is the LLM's; 1: some are not, or a receipt is missing or wrong.

    Parameters
    ----------
    model
        Folder of the LLM; by default the shipped one.
    ca
        PEM file of the fleet's CA: the receipt must be signed by a device that it knows.
    threads
        Cores to compute on.
    json
        Print one JSON object instead of text.
    """
    from fedhlm.decoding.alone import Alone
    from fedhlm_zoo.shipped import model_folder

    proofs = read_proofs(answer)
    authority = None if ca is None else _bytes(ca, "ca")
    llm = Alone.load(model_folder(model, "llm"), threads=threads)
    told = [checked(number, proof, llm, authority) for number, proof in enumerate(proofs)]
    if json:
        print(jsons.dumps({"choices": told}))
    else:
        for found in told:
            print(found["said"])
    return 0 if all(found["own"] for found in told) else FAILED


def read_proofs(path: Path) -> list[dict[str, Any]]:
    """The objects `fedhlm` of an answer's choices.

    Raises:
        ConfigError: the file is no answer, or an answer without receipts.
    """
    try:
        given = jsons.loads(_bytes(path, "ANSWER"))
        proofs = [one["fedhlm"] for one in given.get("choices", [given])]
        complete = bool(proofs) and all({"receipt", "prompt_ids", "tokens"} <= proof.keys() for proof in proofs)
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise ConfigError("ANSWER", str(path), "the JSON of an answer that was not streamed", why=str(exc)) from exc
    if not complete:
        raise ConfigError(
            "ANSWER", str(path), "an answer with a receipt: one of which the LLM verified every token, as under `exact`"
        )
    return proofs


def checked(number: int, proof: dict[str, Any], llm: Any, ca: bytes | None) -> dict[str, Any]:
    """What the check of one choice finds: whether the text is the LLM's own, who signed, and a sentence."""
    import msgspec

    from fedhlm.receipts import Receipt, check_digests, differences

    signed = ""
    try:
        receipt = msgspec.convert(proof["receipt"], Receipt)
        prompt, ids = proof["prompt_ids"], [token["id"] for token in proof["tokens"]]
        check_digests(receipt, prompt, ids)
        if receipt.signature or ca is not None:
            with needing("serve"):
                from fedhlm_doors.signing import check_signature
            signed = check_signature(receipt, ca)
        found = list(differences(receipt, prompt, ids, llm))
    except (ReceiptError, msgspec.ValidationError, KeyError, TypeError) as exc:
        return {"own": False, "tokens": 0, "differ": [], "signed": signed, "said": f"choice {number}: {exc}"}
    words = [llm.decode([one.token]) for one in found], [llm.decode([one.of_llm]) for one in found]
    said = f"choice {number}: {receipt.tokens - len(found)} of {receipt.tokens} tokens are the LLM's own"
    said += f", signed by {signed}" if signed else ", not signed"
    for one, word, of_llm in list(zip(found, *words, strict=True))[:SHOWN]:
        said += f"\n  token {one.number}: {word!r}, where the LLM writes {of_llm!r}"
    differ = [one._asdict() for one in found]
    return {"own": not found, "tokens": receipt.tokens, "differ": differ, "signed": signed, "said": said}


def _bytes(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ConfigError(name, str(path), "a file that can be read", why=exc.strerror or str(exc)) from exc
