"""A loaded model takes little more memory than its weights: what loading leaves behind is returned to the system."""

import subprocess
import sys

from fedhlm.decoding.decoder import load_info
from fedhlm_zoo.shipped import model_folder

LOADS = """
import sys
from pathlib import Path
import onnxruntime, tokenizers
from fedhlm.decoding.models import load_model

def own_bytes():
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

before = own_bytes()
model = load_model(sys.argv[1])
print(own_bytes() - before)
"""


def test_a_loaded_model_takes_little_more_than_its_weights() -> None:
    folder = model_folder("", "llm")
    done = subprocess.run([sys.executable, "-c", LOADS, str(folder)], capture_output=True, text=True, check=True)
    weights = 4 * load_info(folder).parameters  # its arithmetic is in fp32
    assert weights < int(done.stdout) < 1.6 * weights
