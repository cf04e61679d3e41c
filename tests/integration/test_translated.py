"""A fleet whose SLM and LLM have different vocabularies: `exact` is the LLM alone, and other presets write its ids."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edge_broker.embedded import EmbeddedBroker
from fedhlm.decoding.alone import Alone
from fedhlm.errors import RequestRefused
from fedhlm.protocol.messages import Sampling
from fedhlm_zoo.prompts import load_items
from fedhlm_zoo.shipped import model_folder
from tests.integration.live import live

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install 'fedhlm[models]'")

TOKENS = 32
EMOJI = "Grüße aus Zürich 🙂👩‍🚀 你好，世界\n"
EXACT = ("exact", "colocated")
OTHERS = ("budget", "speculative", "fedhlm", "hlm", "u-hlm", "cu-hlm", "rand-hlm", "slm-only")
TITLES = [item.title + "\n" for item in load_items()[:3]]


@pytest.fixture(scope="module")
def slm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped SLM with its ids in another order, which the graph turns into its own."""
    from onnx import helper, numpy_helper

    folder = tmp_path_factory.mktemp("shuffled") / "slm"
    shutil.copytree(model_folder("", "slm"), folder)
    info = json.loads((folder / "model.json").read_bytes())
    old = np.random.default_rng(3).permutation(info["vocab_size"])  # (V,): the old id of each new one
    new = {int(before): after for after, before in enumerate(old)}
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    tokenizer["model"]["vocab"] = {text: new[number] for text, number in tokenizer["model"]["vocab"].items()}
    for token in tokenizer["added_tokens"]:
        token["id"] = new[token["id"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    graph = (model := onnx.load(folder / "model.onnx")).graph
    for node in graph.node:
        node.input[:] = ["old_ids" if name == "input_ids" else name for name in node.input]
        node.output[:] = ["old_logits" if name == "logits" else name for name in node.output]
    graph.initializer.append(numpy_helper.from_array(old, "old"))
    graph.node.insert(0, helper.make_node("Gather", ["old", "input_ids"], ["old_ids"]))
    graph.node.append(helper.make_node("Gather", ["old_logits", "old"], ["logits"], axis=2))
    onnx.save(model, folder / "model.onnx")
    info |= {"name": "shuffled", "eos_ids": [new[0]], "bos_id": new[0]}
    for name in ("model.onnx", "tokenizer.json"):
        data = (folder / name).read_bytes()
        info["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "model.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a device has of the LLM: a folder without weights."""
    folder = tmp_path_factory.mktemp("target")
    for name in ("model.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder("", "llm") / name, folder)
    return folder


async def test_every_preset_speaks_the_ids_of_the_llm(slm: Path, target: Path) -> None:
    llm, accepted, drafts = Alone.load(model_folder("", "llm"), threads=1), 0.0, 0.0
    flags: dict[str, object] = {
        "agent.model": slm,
        "agent.target_tokenizer": target,
        "agent.presets": ",".join((*EXACT, *OTHERS)),
        "generation.deadline_ms": 120_000,
    }
    async with EmbeddedBroker() as broker, live(broker.url, flags=flags) as system:
        for number, text in enumerate([*TITLES, EMOJI]):
            oracle = llm.write(llm.encode(text), Sampling(number, 0.8), TOKENS)
            for preset in EXACT:
                answer = await system.ask(text, preset=preset, max_tokens=TOKENS, seed=number, temperature=0.8)
                assert list(answer.ids) == oracle, (preset, text)
                assert answer.text == llm.decode(oracle)
                assert set(answer.sources) == {"cloud"}
        drafts = system.counters["porch"]["spec_decode_num_draft_tokens"]
        accepted = system.counters["porch"]["spec_decode_num_accepted_tokens"]
        for preset in OTHERS:
            answer = await system.ask(TITLES[0], preset=preset, max_tokens=TOKENS, seed=1, temperature=0.8)
            assert answer.finish in ("stop", "length")
            assert answer.text == llm.decode(list(answer.ids))
            assert "unverified" not in answer.sources, preset
        stop = await system.ask(TITLES[0], preset="exact", max_tokens=TOKENS, seed=0, temperature=0.8, stop=("e",))
        assert stop.finish == "stop"
        assert llm.decode(llm.write(llm.encode(TITLES[0]), Sampling(0, 0.8), TOKENS)).startswith(stop.text + "e")
    assert accepted / drafts > 0.3, "the drafts are the SLM's, in the ids of the LLM"


async def test_trees_grow_in_the_ids_of_the_llm(slm: Path, target: Path) -> None:
    llm = Alone.load(model_folder("", "llm"), threads=1)
    flags: dict[str, object] = {
        "agent.model": slm,
        "agent.target_tokenizer": target,
        "generation.pipeline.kind": "tree",
        "generation.deadline_ms": 120_000,
    }
    async with EmbeddedBroker() as broker, live(broker.url, flags=flags) as system:
        answer = await system.ask(EMOJI, max_tokens=TOKENS, seed=5, temperature=0.8)
    assert list(answer.ids) == llm.write(llm.encode(EMOJI), Sampling(5, 0.8), TOKENS)


async def test_without_the_tokenizer_of_the_llm_the_cloud_says_which_setting_is_missing(slm: Path) -> None:
    async with EmbeddedBroker() as broker, live(broker.url, flags={"agent.model": slm}) as system:
        with pytest.raises(RequestRefused, match="set agent.target_tokenizer to the tokenizer of the cloud's model"):
            await system.ask(TITLES[0], max_tokens=4)
