"""What a device pays: SLM decode speed beside transformers on the same weights, time of a step outside the model,
cold start and resident memory of an agent. Run: python benchmarks/device.py [--reference HF_DIR] [--rounds 5]
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from edge_agent.model import Slm
from fedhlm.decoding.couplings import COUPLINGS
from fedhlm.decoding.decoder import Decoder, DecoderInput
from fedhlm.decoding.uncertainty import closed_form
from fedhlm.protocol.messages import Sampling
from fedhlm_lab.studies.command_line import COUNT, Parser
from fedhlm_zoo.shipped import model_folder

TOKENS = 128

COLD_START = """
import time
began = time.perf_counter()
from pathlib import Path
from edge_agent.model import Slm
from edge_agent.service import AgentService
from fedhlm.decoding.decoder import Decoder
from fedhlm.bus.mqtt import MqttBus
from fedhlm.protocol.messages import Sampling
from fedhlm_zoo.shipped import model_folder
slm = Slm(Decoder.load(model_folder("", "slm"), threads=1))
slm.draft([0, 5, 6], Sampling(seed=1))
seconds = time.perf_counter() - began
status = Path("/proc/self/status").read_text()
print(seconds, int(status.split("VmRSS:")[1].split()[0]) / 1024)
"""


def onnx_decode(decoder: Decoder) -> dict[str, float]:
    """Seconds a token of the whole draft step, of the model alone, and of each part outside it."""
    sampling = Sampling(seed=1)
    slm = Slm(decoder)
    ids = [0, 50, 60]
    began = time.perf_counter()
    for _ in range(TOKENS):
        ids.append(slm.draft(ids, sampling).token)
    whole = (time.perf_counter() - began) / TOKENS
    cache, model, draw, doubt = decoder.empty_cache(), 0.0, 0.0, 0.0
    draft = COUPLINGS[sampling.coupling].draft
    for position, token in enumerate(ids[: TOKENS + 3]):
        t0 = time.perf_counter()
        result = decoder.forward([DecoderInput(cache, [token])])[0]
        t1 = time.perf_counter()
        drawn = draft(result.logits[-1], sampling, position + 1)
        t2 = time.perf_counter()
        closed_form(result.logits[-1], drawn.token)
        t3 = time.perf_counter()
        cache = result.cache
        model, draw, doubt = model + t1 - t0, draw + t2 - t1, doubt + t3 - t2
    return {"step_s": whole, "model_s": model / TOKENS, "draw_s": draw / TOKENS, "uncertainty_s": doubt / TOKENS}


def transformers_decode(folder: Path) -> float:
    """Seconds a token of transformers' eager greedy decoding with its cache, one thread."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[0, 50, 60]])
    with torch.no_grad():
        past = None
        began = time.perf_counter()
        for _ in range(TOKENS):
            out = model(ids, past_key_values=past, use_cache=True)
            past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        return (time.perf_counter() - began) / TOKENS


def main() -> None:
    """Measure everything, alternating the compared sides, and print medians as JSON."""
    parser = Parser(description=__doc__)
    parser.add_argument("--reference", type=Path, help="Hugging Face directory with the SLM's weights")
    parser.add_argument("--rounds", type=COUNT, default=5, help="times that everything is measured")
    options = parser.parse_args()
    decoder = Decoder.load(model_folder("", "slm"), threads=1)
    rounds, eager, cold = [], [], []
    for _ in range(options.rounds):
        rounds.append(onnx_decode(decoder))
        if options.reference:
            eager.append(transformers_decode(options.reference))
        printed = subprocess.run([sys.executable, "-c", COLD_START], capture_output=True, text=True, check=True).stdout
        cold.append([float(x) for x in printed.split()])
    step = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    report = {
        "onnx_tokens_per_second": 1 / step["step_s"],
        "onnx_model_only_tokens_per_second": 1 / step["model_s"],
        "share_of_step_outside_model": 1 - step["model_s"] / step["step_s"],
        "draw_us": step["draw_s"] * 1e6,
        "uncertainty_us": step["uncertainty_s"] * 1e6,
        "cold_start_s": statistics.median(c[0] for c in cold),
        "resident_mib": statistics.median(c[1] for c in cold),
    }
    if eager:
        report["transformers_tokens_per_second"] = 1 / statistics.median(eager)
        report["ratio_to_transformers"] = statistics.median(eager) / step["step_s"]
    print(json.dumps({key: round(value, 3) for key, value in report.items()}, indent=2))


if __name__ == "__main__":
    main()
