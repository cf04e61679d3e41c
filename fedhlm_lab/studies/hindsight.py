"""The best threshold in hindsight: topic questions sorted by their doubt, with both models' answers known beforehand.

No rule that learns its threshold from verdicts can do better on the average with the same doubt.

Run: python -m fedhlm_lab.studies.hindsight --recording FILE [--prompts 7600] [--sent 0.01 0.02 ...]
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedhlm.decoding.decoder import Decoder
from fedhlm.progress import progress
from fedhlm_lab.studies.command_line import COUNT, Parser, limited, out_file
from fedhlm_lab.studies.command_line import run as run_study
from fedhlm_lab.studies.compare import Oracle, shuffled_test_split, tasks_of
from fedhlm_lab.studies.recorded import RecordedText, load_or_record
from fedhlm_zoo.shipped import model_folder


class HindsightFigures(NamedTuple):
    """The share of answers that is sent, that is kept and differs from the LLM's, and the doubt of the last one sent.

    `points` is how many answers of a hundred are right for the LLM alone beyond those of the device, and `error` its
    standard error.
    """

    sent: float
    harm: float
    points: float
    error: float
    doubt: float


def hindsight(texts: Sequence[RecordedText], sent: float) -> HindsightFigures:
    """Send the most doubtful share `sent` of texts of one token each, whose answers are right or wrong.

    Raises:
        ValueError: there are no texts, or one of them is no topic question.
    """
    right = [text.right for text in texts if text.right is not None]
    if not texts or len(right) < len(texts):
        raise ValueError(f"texts must be topic questions, at least one (got {len(texts)}, of which {len(right)} are)")
    order = np.argsort([-text.doubts[0] for text in texts], kind="stable")  # (n,)
    count = round(sent * len(texts))
    kept = np.ones(len(texts), bool)  # (n,)
    kept[order[:count]] = False
    lost = np.array([float(large) - float(small) for large, small in right]) * kept  # (n,)
    harm = float((np.array([text.harms[0] for text in texts]) * kept).mean())
    doubt = texts[order[count - 1]].doubts[0] if count else 1.0
    error = 100.0 * float(lost.std()) / len(texts) ** 0.5
    return HindsightFigures(count / len(texts), harm, 100.0 * float(lost.mean()), error, doubt)


def show(lines: Sequence[HindsightFigures]) -> str:
    """The table in Markdown."""
    rows = ["| sent | saved | doubt from which on | differ from the LLM | points below the LLM |", "|" + "---|" * 5]
    rows += [
        f"| {x.sent:.1%} | {1.0 - x.sent:.1%} | {x.doubt:.2f} | {x.harm:.2%} | {x.points:.2f} ± {x.error:.2f} |"
        for x in lines
    ]
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = Parser(prog="python -m fedhlm_lab.studies.hindsight", description="the best threshold on topic questions")
    parser.add_argument(
        "--recording", type=out_file, required=True, help="file of the recorded texts; written if absent"
    )
    parser.add_argument("--prompts", type=COUNT, default=7_600, help="items of the AG News test split")
    parser.add_argument(
        "--sent",
        type=limited(float, 0, 1),
        nargs="+",
        default=[0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1],
        help="shares of answers to send",
    )
    options = parser.parse_args(arguments)
    large, small = Oracle(model_folder("", "llm")), Decoder.load(model_folder("", "slm"), threads=1)
    articles = shuffled_test_split()[: options.prompts]
    tasks = tasks_of(articles, "topic", large.decoder, tokens=1, temperature=0.0)
    with progress("texts recorded", len(tasks)) as ended:
        texts = load_or_record(options.recording, tasks, large, small, "gumbel", ended)
    print(show([hindsight(texts, sent) for sent in options.sent]))
    return 0


if __name__ == "__main__":
    sys.exit(run_study(main, "python -m fedhlm_lab.studies.hindsight"))
