"""Settings of a cloud."""

from typing import Annotated, Literal

from msgspec import Meta

from fedhlm.settings.model_server import ModelServer
from fedhlm.settings.section import BatchSize, GgufContext, Provider, Section, Threads, WaitMs


class Cloud(Section, frozen=True):
    """The verifier with the large model."""

    model: Annotated[
        str,
        Meta(
            description="Folder (ONNX) or GGUF file of the large model, or the URL of a server that runs it, such as "
            "http://localhost:8000/v1 (`cloud.server`). Empty: the shipped one."
        ),
    ] = ""
    draft_model: Annotated[
        str,
        Meta(
            description="Folder of a small model with the tokenizer of `model`, which drafts for devices that ask for "
            "it (`generation.pipeline.drafts`). Empty: the shipped one beside the shipped `model`, otherwise none."
        ),
    ] = ""
    context: GgufContext = 4_096
    server: ModelServer = ModelServer()
    state: Annotated[str, Meta(description="Folder for the federation's sums. Empty: nothing survives a restart.")] = ""
    threads: Annotated[Threads, Meta(description="Threads of the model. 0: onnxruntime's choice.")] = 0
    providers: Annotated[
        tuple[Provider, ...],
        Meta(
            description="Execution providers of onnxruntime in order of preference, as in `agent.providers`. A Hugging "
            "Face folder runs on a CUDA device if CUDAExecutionProvider is among them."
        ),
    ] = ()
    dtype: Annotated[
        Literal["", "float32", "bfloat16"],
        Meta(
            description="Type of weights and arithmetic of a Hugging Face folder. bfloat16 needs half the memory, and "
            "makes logits depend on the size of a block. Empty: float32."
        ),
    ] = ""
    sessions_max: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000,
            description="Most sessions that are open at once. A session that was dropped costs one more round trip.",
        ),
    ] = 1_024
    sessions_bytes: Annotated[
        int,
        Meta(
            ge=1,
            le=2**50,
            description="Most bytes of the contexts of all sessions, beside their KV caches (`cache_bytes`).",
        ),
    ] = 64 * 1024 * 1024
    cluster_blocks_s: Annotated[
        float,
        Meta(
            ge=0.0,
            le=1e6,
            description="Blocks a second that the cloud takes from one cluster, after a burst of four seconds' worth. "
            "Blocks beyond it are refused at once. 0: no limit.",
        ),
    ] = 4_000.0
    cluster_bytes_s: Annotated[
        float,
        Meta(
            ge=0.0, le=1e12, description="Bytes a second that the cloud takes from one cluster, as `cluster_blocks_s`."
        ),
    ] = 64.0 * 1024 * 1024
    cache_bytes: Annotated[
        int,
        Meta(
            ge=1,
            le=2**50,
            description="Most bytes of KV caches. The caches of the sessions that wait longest are dropped first, "
            "and computed again.",
        ),
    ] = 256 * 1024 * 1024
    batch_max: Annotated[BatchSize, Meta(description="Most blocks that one call of the model verifies.")] = 64
    batch_tokens: Annotated[
        int,
        Meta(
            ge=1,
            le=1_048_576,
            description="Most tokens in one call of the model. A longer context takes several calls, of a quarter as "
            "many tokens beside shorter blocks and of four times as many without. Raise it for a GPU.",
        ),
    ] = 32
    batch_wait_ms: Annotated[
        WaitMs, Meta(description="Milliseconds that a block waits for others to be verified with it (`batch_max`).")
    ] = 2.0
    text_tokens_s: Annotated[
        float,
        Meta(
            ge=0.0,
            le=1e6,
            description="Tokens a second that each text should get. When not all blocks fit into a call of the model, "
            "the one whose tokens are due first at this pace goes first, among agents that have used about as much of "
            "the model (earliest deadline first). 0: whoever has used the model least goes first.",
        ),
    ] = 0.0
