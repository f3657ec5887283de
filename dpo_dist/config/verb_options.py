"""The keys of single verbs: `compare`, `doctor`, `export`, `pairs`."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from dpo_dist.config.fields import key, section


@dataclass(frozen=True)
class CompareConfig:
    """Models that `python -m dpo_dist.compare` asks the same prompts of `data.eval`; judge: see `pairs`."""

    models: list[str] = key(
        [],
        "Models to compare, each PATH or NAME=PATH: a run directory (its trained model), a checkpoint, a "
        "folder of a model or an adapter, or a hub name. The first is the base of KL and win rates.",
    )
    prompts: int = key(
        128, "Different prompts, chosen by a hash of `seed` and prompt; all, if there are fewer.", at_least=1
    )
    max_new_tokens: int = key(256, "Most tokens of a response.", at_least=1)
    temperature: float = key(
        1.0,
        "Temperature of sampling; 0: the likeliest token each time. Only at 1 the KL has no bias.",
        at_least=0,
    )
    seed: int = key(0, "Seed of prompts, samples and intervals.", at_least=0)
    batch_tokens: int = key(
        16384,
        "Most tokens of a batch of one process: its rows times the longest prompt with its response.",
        at_least=1,
    )
    part_prompts: int = key(
        16, "Prompts of one part: processes share the parts, and finished ones are not repeated.", at_least=1
    )
    resamples: int = key(
        1000, "Resamples of the prompts for 95 % confidence intervals; 0: no intervals.", at_least=0
    )


FailOn = StrEnum("FailOn", ["warning", "error", "never"])


@dataclass(frozen=True)
class DoctorConfig:
    """The examination of the data by `python -m dpo_dist.doctor`."""

    thresholds: Any = key(
        None,
        "Other thresholds of rules, by name: `{duplicates: 0.05}`; docs/doctor.md lists the rules.",
        accepts="null or a mapping of rules to numbers",
    )
    fail_on: FailOn = key(FailOn.warning, "Lowest level of a finding that makes the exit code 1.")
    benchmarks: list[str] = key(
        [], "Files of benchmark prompts, .jsonl or .txt, that training data should not contain."
    )
    shown_pairs: int = key(
        4, "Pairs of each source to show decoded, besides examples of findings; 0: none.", at_least=0
    )
    texts: bool = key(True, "Whether the page has texts of records; they are hidden until clicked.")


ExportedWeights = StrEnum("ExportedWeights", ["last", "ema"])


@dataclass(frozen=True)
class ExportConfig:
    """The model folder that `python -m dpo_dist.export` writes from checkpoints of `run.dir`."""

    checkpoint: str = key(
        "latest",
        "`latest`, `best` (by `trainer.keep_best`), or the name of one: `step-000100`.",
        accepts="latest, best, or the name of a folder in checkpoints/, such as step-000100",
        pattern=r"latest|best|step-\d{1,18}",
    )
    weights: ExportedWeights = key(
        ExportedWeights.last,
        "`last`: the weights of the checkpoint's step; `ema`: their moving average (`trainer.ema_decay`).",
    )
    average: list[str] = key(
        [],
        "In place of a checkpoint, the mean of whole models: their folders, such as `export` writes.",
    )
    average_weights: list[float] = key(
        [], "The weights of `export.average`, divided by their sum; empty: equal ones.", above=0
    )
    merge: bool = key(False, "Write an adapter and its base as one model.")
    dtype: str | None = key(
        None,
        "Precision of the written weights; null: `model.dtype`, for the weights of a merged base that of "
        "its files.",
        accepts="bf16, fp16 or fp32",
        pattern=r"bf16|fp16|fp32",
    )
    check: bool = key(
        True,
        "Load the folder by transformers (and peft) before it gets its name, and compare log-probs of "
        "training pairs with those of the trained weights.",
    )
    output: str | None = key(
        None,
        "Folder to write, which must not exist; null: `<run.dir>/exported/<checkpoint>`, with `-ema` and "
        "`-merged` after it; of `export.average` `<run.dir>/exported/average`.",
        filled=True,
    )


PairsMethod = StrEnum("PairsMethod", ["scores", "samples", "delta", "people"])
PairSelection = StrEnum("PairSelection", ["best_worst", "best_random", "all_pairs"])
Engine = StrEnum("Engine", ["auto", "vllm", "transformers"])
DropOrKeep = StrEnum("DropOrKeep", ["drop", "keep"])
RoundReference = StrEnum("RoundReference", ["first", "previous"])
Verdicts = StrEnum("Verdicts", ["compare", "grade"])

JUDGING = "compare pairs"
"""The verbs that use a judge."""


@dataclass(frozen=True)
class EndpointConfig:
    """A judge behind an OpenAI-compatible API; prompts and responses are sent to it."""

    url: str | None = key(
        None, "Address up to the version: `http://localhost:8000/v1`; null: no such judge.", filled=True
    )
    model: str | None = key(None, "Name of the model, as the endpoint lists it.", filled=True)
    verdicts: Verdicts = key(
        Verdicts.compare,
        "`compare`: each two responses, in both positions; `grade`: each response by itself, 1 to 10.",
    )
    criterion: str = key(
        "the better response is more helpful, honest and harmless, and follows the instructions",
        "The judge's criterion, in one clause.",
        filled=True,
    )
    key_variable: str = key(
        "OPENAI_API_KEY", "Environment variable with the API key; without a value, none is sent.", filled=True
    )
    max_tokens: int = key(1024, "Most tokens of a verdict, with the judge's reasons.", at_least=1)
    timeout_seconds: float = key(120.0, "Longest wait for a reply, in seconds.", above=0)
    retries: int = key(
        6, "Repetitions of a request that failed, after growing pauses or as the endpoint asks.", at_least=0
    )
    parallel_requests: int = key(8, "Requests at a time, of each process.", at_least=1)
    requests_per_minute: int | None = key(
        None, "Most requests a minute, over all processes; null: no limit.", at_least=1
    )


@dataclass(frozen=True)
class PeopleConfig:
    """The labelling page of `pairs.method=people`."""

    port: int = key(0, "Port of the page on 127.0.0.1; 0: a free one.", at_least=0, at_most=65535)
    overlap: float = key(
        0.2,
        "Share of the comparisons that every annotator judges, for their agreement.",
        at_least=0,
        at_most=1,
    )


@dataclass(frozen=True)
class PairsConfig:
    """Preference records made of the prompts of `data.train`, or of the scores in it."""

    method: PairsMethod = key(
        PairsMethod.scores,
        "`scores`: from scores in the data; `samples`: responses of models, scored by a judge; `delta`: "
        "responses of a stronger model, preferred to those of a weaker one; `people`: labelled by people.",
    )
    output: str | None = key(
        None,
        "File of the pairs, .jsonl or .parquet; null: `<run.dir>/pairs/pairs.jsonl`.",
        filled=True,
    )
    limit: int | None = key(
        None,
        "Number of different prompts to use; `scores`: of usable records, `people`: of comparisons. null: "
        "all, or 1000 for `people`.",
        at_least=1,
    )
    select: PairSelection = key(
        PairSelection.best_worst,
        "Pairs of a prompt, by scores: best and worst, best and a random one, or all.",
    )
    margin: float = key(
        0.0, "Scores of a pair differ by more than this; equal scores are never a pair.", at_least=0
    )
    seed: int = key(0, "Seed of samples and random choices.", at_least=0)
    models: list[str] = key(
        [],
        "Models that respond, as folders (also of adapters) or hub names; `delta`: the stronger one, then "
        "the weaker one. Empty: `model.path`.",
    )
    samples: int = key(4, "Responses of each model to a prompt; `delta` takes one.", at_least=1)
    max_new_tokens: int = key(512, "Most tokens of a response.", at_least=1)
    temperature: float = key(1.0, "Temperature of sampling; 0: the likeliest token each time.", at_least=0)
    top_p: float = key(
        1.0, "Sample from the likeliest tokens with this sum of probabilities.", above=0, at_most=1
    )
    top_k: int = key(0, "Sample from this number of likeliest tokens; 0: from all.", at_least=0)
    unfinished: DropOrKeep = key(
        DropOrKeep.drop, "Responses that did not end within `max_new_tokens`: `drop` or `keep` (counted)."
    )
    encoded_differently: DropOrKeep = key(
        DropOrKeep.keep,
        "Responses that training encodes as other tokens than were generated: `drop` or `keep` (counted).",
        added=True,
    )
    engine: Engine = key(Engine.auto, "Program that generates; `auto`: vLLM if it is installed.")
    batch_tokens: int = key(
        32768, "Most tokens of a batch: its rows times the longest prompt with its response.", at_least=1
    )
    part_prompts: int = key(
        64, "Prompts of one part: after an interruption, finished parts are not repeated.", at_least=1
    )
    reward_model: str | None = key(
        None,
        "Judge: folder or hub name of a sequence classification model with one output.",
        filled=True,
        verbs=JUDGING,
    )
    function: str | None = key(
        None, "Judge: your own function, as `module:function`.", filled=True, verbs=JUDGING
    )
    endpoint: EndpointConfig = section(EndpointConfig, verbs=JUDGING)
    people: PeopleConfig = section(PeopleConfig)
    prompt_parts: int = key(
        1,
        "Parts into which the prompts are divided, by their contents; round after round takes the next.",
        at_least=1,
    )
    prompt_part: int = key(
        0, "The part to use, of `prompt_parts`; with rounds, of the first round.", at_least=0
    )
    rounds: int = key(
        0,
        "Rounds of sampling, scoring, pairing and training, by one command; 0: make pairs only.",
        at_least=0,
    )
    reference: RoundReference = key(
        RoundReference.previous,
        "Reference model of a round's training: the `first` one, or the policy of the `previous` round.",
    )
    launcher: str | None = key(
        None,
        "Command before `-m dpo_dist.train` in rounds, such as `accelerate launch`; null: this with several "
        "GPUs, else one process.",
        filled=True,
    )
