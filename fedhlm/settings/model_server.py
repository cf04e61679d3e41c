"""Settings of a cloud whose model runs on a server."""

from typing import Annotated

from msgspec import Meta

from fedhlm.settings.section import Section


class ModelServer(Section, frozen=True):
    """The server of the large model, if `cloud.model` is the URL of an OpenAI-compatible API (docs/models.md)."""

    name: Annotated[str, Meta(description="Name of the model at the server. Empty: the only one that it serves.")] = ""
    tokenizer: Annotated[
        str,
        Meta(
            description="Folder of the server's model with its tokenizer.json, tokenizer_config.json and config.json, or a "
            "GGUF file of it. Weights are not needed in a folder."
        ),
    ] = ""
    key: Annotated[
        str,
        Meta(description="File with the API key of the server, which only its owner can read. Empty: it needs none."),
    ] = ""
    logprobs: Annotated[
        int,
        Meta(
            ge=1,
            le=1_048_576,
            description="Number of likeliest tokens that the server is asked for; vLLM allows --max-logprobs. Texts "
            "with at most this `generation.top_k` are the model's own, and so are greedy ones.",
        ),
    ] = 20
    context: Annotated[
        int, Meta(ge=0, le=2**31, description="Context of the model in tokens. 0: what the server tells.")
    ] = 0
    timeout_s: Annotated[
        float, Meta(gt=0.0, le=3_600.0, description="Seconds to wait for the server before a block is refused.")
    ] = 60.0
