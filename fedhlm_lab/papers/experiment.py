"""Experiments as TOML files in `fedhlm_lab/papers/experiments`: parameters, seeds, and the papers' values."""

import difflib
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, Self

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from fedhlm.config import read_toml
from fedhlm.errors import ConfigError, UnknownKey

Amount = Annotated[int, Meta(ge=1, le=1_000_000)]
Unit = Annotated[float, Meta(ge=0.0, le=1.0)]
Pace = tuple[Annotated[float, Meta(ge=0.0, le=3_600.0)], Annotated[float, Meta(gt=0.0, le=3_600.0)]]
"""The seconds of a call of a model, and of each token in it."""
FOLDER: Final = resources.files("fedhlm_lab.papers") / "experiments"


class LabSample(NamedTuple):
    """How a run differs from the experiment's file: a smaller one, and parameters of one's own, from a file.

    A table among the parameters replaces the whole table of the experiment.
    """

    quick: bool = False
    parameters: Mapping[str, Any] = {}
    source: str = ""

    @classmethod
    def of(cls, quick: bool, file: Path | None) -> Self:
        """The sample that a command line asks for.

        Raises:
            ConfigError: the file cannot be read, or is no TOML.
        """
        return cls(quick) if file is None else cls(quick, read_toml(file, key="--parameters"), file.name)


WHOLE: Final = LabSample()
NOT_PARAMETERS: Final = (
    "paper",
    "quick",
)  # what is compared, which each experiment computes by name, and another sample


class PaperValue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A value of a paper: where it stands, what it is called here, and how far ours may be from it.

    `why_not` says why the number cannot be right, or cannot be compared; empty where nothing speaks against it.
    """

    place: str
    name: str
    value: float
    tolerance: Annotated[float, Meta(ge=0.0)]
    why_not: str = ""

    def met(self, ours: float) -> bool:
        """Whether our value is within the tolerance."""
        return abs(ours - self.value) <= self.tolerance


class Experiment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every experiment has: it runs with `seeds` seeds that count up from `seed`.

    `quick` holds what differs in the smaller sample.
    """

    title: str
    articles: Amount
    seed: Annotated[int, Meta(ge=0, lt=2**31)]
    seeds: Annotated[int, Meta(ge=2, le=1_000)]
    quick: dict[str, Any] = {}
    paper: tuple[PaperValue, ...] = ()

    @classmethod
    def load(cls, name: str, sample: LabSample = WHOLE) -> Self:
        """Read a shipped experiment.

        Raises:
            ConfigError: a parameter of the sample is impossible.
            UnknownKey: the experiment has no such parameter.
        """
        tree = tomllib.loads((FOLDER / f"{name}.toml").read_text("utf-8"))
        if sample.quick:
            tree |= tree.get("quick", {})
        source, keys = f"file {sample.source}", [key for key in cls.__struct_fields__ if key not in NOT_PARAMETERS]
        for key, value in sample.parameters.items():
            if key not in keys:
                near = difflib.get_close_matches(key, keys, n=1)
                hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(keys)}"
                raise UnknownKey(key, value, hint, source=source)
            try:
                msgspec.convert({**tree, key: value}, cls)
            except msgspec.ValidationError as exc:
                raise ConfigError(key, value, f"a value as in {name}.toml", source=source, why=str(exc)) from exc
        return msgspec.convert({**tree, **sample.parameters}, cls)

    def smaller(self, articles: int) -> Self:
        """The same experiment where there are at most so many articles."""
        return replace(self, articles=min(self.articles, articles))

    def each_seed(self) -> list[Self]:
        """The same experiment with each of its seeds."""
        return [replace(self, seed=self.seed + number) for number in range(self.seeds)]


class FedhlmExperiment(Experiment, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """FedHLM's evaluation: clients in clusters answer requests of one token in rounds of learning.

    A `sample` of the requests is run again in the simulator.
    """

    sample: Amount
    requests: Amount
    clients: Amount
    clusters: Amount
    rounds: Amount
    alphas: Annotated[tuple[Annotated[float, Meta(gt=0.0)], ...], Meta(min_length=1)]
    send_probability: Unit
    fixed_tau: Unit
    budget: Annotated[float, Meta(gt=0.0, le=1.0)]


class UhlmExperiment(Experiment, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """U-HLM's and CU-HLM's evaluation. Times are in seconds, the bandwidth in hertz, sizes in bytes, SNR in decibels.

    `rows` tokens of each article are read, and `questions` are asked about topics, of which a `sample` is run again in
    the simulator. `paper_rate` is the share of tokens that CU-HLM sends, and `paper_compression` the part of a law that
    it saves.
    """

    sample: Amount
    rows: Amount
    questions: Amount
    temperature: Annotated[float, Meta(ge=0.0, le=10.0)]
    budget: Annotated[float, Meta(gt=0.0, le=1.0)]
    taus: Annotated[tuple[Unit, ...], Meta(min_length=1)]
    vocabularies: Annotated[tuple[Annotated[int, Meta(ge=64, lt=2**24)], ...], Meta(min_length=1)]
    bandwidth_hz: Annotated[float, Meta(gt=0.0)]
    snr_db: Annotated[tuple[float, ...], Meta(min_length=1)]
    slm_s: Annotated[float, Meta(ge=0.0)]
    llm_s: Annotated[float, Meta(ge=0.0)]
    paper_law_bytes: Annotated[float, Meta(gt=0.0)]
    paper_top_bytes: Annotated[float, Meta(gt=0.0)]
    paper_rate: Annotated[float, Meta(gt=0.0, le=1.0)]
    paper_compression: Unit
    paper_speedup: Annotated[float, Meta(gt=0.0)]


class PacedExperiment(Experiment, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Simulated fleets of `agents`, one for each system and seed, with given compute times.

    The models' paces are `device_s` for the SLM on a device, `beside_s` for the same one at the cloud, and `large_s` for
    the LLM.
    """

    agents: Amount
    device_s: Pace
    beside_s: Pace
    large_s: Pace


class ParetoExperiment(PacedExperiment, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Presets on links, with all agents in one cluster. Without `presets` or `links` there are all.

    Presets that learn read `warm` texts first. Then there are `texts` of at most `tokens` tokens on each link.
    """

    presets: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    warm: Amount
    texts: Amount
    tokens: Amount


class AblationWorkload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A workload by the name that `--workload` has: what reports call it, and its texts as in ParetoExperiment."""

    title: str
    warm: Amount
    texts: Amount
    tokens: Amount


class AblatedPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the system of a preset and `settings`; the settings `without` switch it off.

    It is compared on `workloads`, by default on all.
    """

    name: str
    preset: str
    settings: dict[str, str] = {}
    without: dict[str, str]
    workloads: tuple[str, ...] = ()


class AblationsExperiment(PacedExperiment, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Systems with a part and without it, whose agents are dealt out to `clusters`."""

    clusters: Amount
    links: Annotated[tuple[str, ...], Meta(min_length=1)]
    workloads: Annotated[dict[str, AblationWorkload], Meta(min_length=1)]
    parts: Annotated[tuple[AblatedPart, ...], Meta(min_length=1)]


class VerifierKind(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A verifier: its batches, and what divides the cost of a call beyond the smallest one.

    `text_tokens_s` is the cloud's setting: the pace by which texts have deadlines, or 0.
    """

    cheaper: Annotated[float, Meta(ge=1.0, le=1e6)]
    batch_tokens: Amount
    text_tokens_s: Annotated[float, Meta(ge=0.0)] = 0.0


class CapacityExperiment(Experiment, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fleets of so many `agents` on one verifier, each writing `texts` texts of at most `tokens` tokens over `link`.

    There are `seeds` fleets for each point, beginning with `seed`, and `prompts` different prompts. Fleets that learn
    begin with what a fleet of LEARNERS agents has learnt from `warm` texts. In one more fleet, `mixed`, agents take these
    presets in turn, and of every four one has prompts of at least `long` tokens. Capacity is told for each of the
    `targets`, in tokens a second and agent, beside that of the preset `baseline`.
    """

    presets: Annotated[tuple[str, ...], Meta(min_length=1)]
    baseline: str
    link: str
    agents: Annotated[tuple[Amount, ...], Meta(min_length=2)]
    warm: Amount
    texts: Amount
    tokens: Amount
    prompts: Amount
    mixed: tuple[str, ...] = ()
    long: Amount = 1
    targets: tuple[Annotated[float, Meta(gt=0.0)], ...]
    verifiers: Annotated[dict[Annotated[str, Meta(pattern=r"^[\w-]+$")], VerifierKind], Meta(min_length=1)]
