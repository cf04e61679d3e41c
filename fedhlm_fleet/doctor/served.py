"""The check of a large model that runs on a server."""

import asyncio

from cloud_verifier.backends.openai import ServedModel, is_url, served
from cloud_verifier.wiring import LargeModel
from fedhlm.decoding.invariance import TOLERANCE
from fedhlm.errors import FedhlmError
from fedhlm.settings import Cloud
from fedhlm_fleet.doctor.finding import CheckedModel, Remark, Subject, fail, ok, warn


def on_server(subject: Subject) -> bool:
    """Whether the part is a cloud whose model runs on a server."""
    return subject.traits.verifies and is_url(subject.config.cloud.model)


def model_on_server(subject: Subject) -> Remark:
    """Check that the server answers, cuts texts into the same tokens, and tells log-probabilities."""
    cloud = subject.config.cloud
    try:
        found = asyncio.run(_looked_at(cloud))
    except FedhlmError as exc:
        return fail(str(exc), "start the server, or correct cloud.model and the keys of cloud.server")
    subject.model = CheckedModel(found.folder, None, LargeModel.of_server(found).fingerprint, "")
    said = f"{found.name} at {cloud.model}, context {found.context}, the likeliest {cloud.server.logprobs} tokens told"
    if found.difference > TOLERANCE:
        return warn(
            f"{said}; they change by up to {found.difference:.2g} with the size of a block, {TOLERANCE:g} allowed",
            "start vLLM with VLLM_BATCH_INVARIANT=1, or serve the model in float32",
        )
    return ok(said)


async def _looked_at(cloud: Cloud) -> ServedModel:
    async with served(cloud.model, cloud.server) as found:
        return found
