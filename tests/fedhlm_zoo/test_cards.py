"""A model card says what the folder holds and what was measured."""

from fedhlm.decoding.decoder import FileInfo, ModelInfo
from fedhlm_zoo.cards import ARITHMETIC, ModelFigures, render_card
from fedhlm_zoo.evaluate import Agreement, Evaluation

INFO = ModelInfo(
    name="small",
    architecture="LlamaForCausalLM",
    vocab_size=4096,
    context=512,
    layers=4,
    kv_heads=4,
    head_dim=48,
    hidden_size=192,
    eos_ids=(0,),
    bos_id=0,
    parameters=2_557_632,
    quantisation="int8-dynamic",
    files={"model.onnx": FileInfo(2_780_000, "0" * 64), "tokenizer.json": FileInfo(9, "ab" * 32)},
)
BEFORE = Evaluation(articles=7600, topic_accuracy=0.8612, tokens=400_000, perplexity=71.234)
AFTER = Evaluation(articles=7600, topic_accuracy=0.8598, tokens=400_000, perplexity=71.5)
PAIR = Agreement(prompts=200, greedy=0.751, greedy_tokens=11_000, gumbel=0.772, gumbel_tokens=10_000, temperature=0.8)


def test_figures_before_and_after_stand_in_one_table() -> None:
    figures = (
        ModelFigures(label="fp32", graph_bytes=10_350_000, evaluation=BEFORE),
        ModelFigures(label="int8-dynamic", graph_bytes=2_780_000, evaluation=AFTER, agreement=PAIR),
    )
    card = render_card(INFO, purpose="Drafts.", training="Trained.", figures=figures, limits="News only.")
    assert card.startswith("# small\n\nDrafts.\n")
    assert "| fp32 | 10.35 MB | 86.12% | 71.23 |  |  |" in card
    assert "| int8-dynamic | 2.78 MB | 85.98% | 71.50 | 0.751 | 0.772 |" in card
    assert "7600 articles" in card
    assert "200 test titles" in card
    assert "`abababababababab`" in card
    assert "News only." in card
    assert ARITHMETIC["int8-dynamic"] in card


def test_columns_without_a_measurement_are_left_out() -> None:
    figures = (ModelFigures(label="fp32", graph_bytes=1, evaluation=BEFORE),)
    assert "| form | graph | topic | perplexity |\n" in render_card(INFO, purpose="p", training="t", figures=figures)
    assert "## Figures" not in render_card(INFO, purpose="p", training="t", figures=())
