"""The keys of single verbs: `compare`, `doctor`, `export`, `pairs`."""

from enum import StrEnum
from typing import Annotated

from pydantic import BeforeValidator, Field

from dpo_dist.config.fields import Filled, as_entry, key, schema, section


@schema
class CompareConfig:
    """Models that `python -m dpo_dist.compare` asks the same prompts of `data.eval`; judge: see `pairs`."""

    models: list[str] = key(
        [],
        "Models to compare, each PATH or NAME=PATH: a run directory (its trained model), a checkpoint, a "
        "folder of a model or an adapter, or a hub name. The first is the base of KL and win rates.",
    )
    prompts: int = key(
        128, "Different prompts, chosen by a hash of `seed` and prompt; all, if there are fewer.", ge=1
    )
    max_new_tokens: int = key(256, "Most tokens of a response.", ge=1)
    temperature: float = key(
        1.0, "Temperature of sampling; 0: the likeliest token each time. Only at 1 the KL has no bias.", ge=0
    )


FailOn = StrEnum("FailOn", ["warning", "error", "never"])


@schema
class DoctorConfig:
    """The examination of the data by `python -m dpo_dist.doctor`."""

    thresholds: dict[str, Annotated[float, Field(strict=True, ge=0)]] | None = key(
        None,
        "Other thresholds of rules, by name: `{duplicates: 0.05}`; docs/doctor.md lists the rules.",
        accepts="null or a mapping of rules to numbers of 0 or more: {duplicates: 0.05}",
    )
    fail_on: FailOn = key(FailOn.warning, "Lowest level of a finding that makes the exit code 1.")
    benchmarks: list[str] = key(
        [], "Files of benchmark prompts, .jsonl or .txt, that training data should not contain."
    )
    texts: bool = key(True, "Whether the page has texts of records; they are hidden until clicked.")


@schema
class MemberConfig:
    """One entry of `export.average`; a bare string is its `path`."""

    path: Filled = key(..., "Folder of a whole model, such as `export` writes.")
    weight: float = key(1.0, "Its weight in the mean, divided by their sum.", gt=0)


Member = Annotated[MemberConfig, BeforeValidator(as_entry("path"))]
ExportedWeights = StrEnum("ExportedWeights", ["last", "ema"])


@schema
class ExportConfig:
    """The model folder that `python -m dpo_dist.export` writes from checkpoints of `run.dir`."""

    checkpoint: str = key(
        "latest",
        "`latest`, `best` (by `trainer.keep_best`), or the name of one: `step-000100`.",
        accepts="latest, best, or the name of a folder in checkpoints/, such as step-000100",
        pattern=r"^(latest|best|step-\d{1,18})$",
    )
    weights: ExportedWeights = key(
        ExportedWeights.last,
        "`last`: the weights of the checkpoint's step; `ema`: their moving average (`trainer.ema_decay`).",
    )
    average: list[Member] = key(
        [],
        "In place of a checkpoint, the mean of whole models: their folders, such as `export` writes.",
    )
    merge: bool = key(False, "Write an adapter and its base as one model.")
    dtype: str | None = key(
        None,
        "Precision of the written weights; null: `model.dtype`, for the weights of a merged base that of "
        "its files.",
        accepts="bf16, fp16 or fp32",
        pattern=r"^(bf16|fp16|fp32)$",
    )
    check: bool = key(
        True,
        "Load the folder by transformers before it gets its name, and compare its weights with the trained "
        "ones.",
    )
    output: Filled | None = key(
        None,
        "Folder to write, which must not exist; null: `<run.dir>/exported/<checkpoint>`, with `-ema` and "
        "`-merged` after it; of `export.average` `<run.dir>/exported/average`.",
    )


PairsMethod = StrEnum("PairsMethod", ["scores", "samples", "delta", "people"])
PairSelection = StrEnum("PairSelection", ["best_worst", "best_random", "all_pairs"])
DropOrKeep = StrEnum("DropOrKeep", ["drop", "keep"])
RoundReference = StrEnum("RoundReference", ["first", "previous"])
Verdicts = StrEnum("Verdicts", ["compare", "grade"])

JUDGING = "compare pairs"
"""The verbs that use a judge."""


@schema
class EndpointConfig:
    """A judge behind an OpenAI-compatible API; prompts and responses are sent to it."""

    url: str | None = key(
        None,
        "Address up to the version: `http://localhost:8000/v1`; null: no such judge.",
        accepts="http://HOST:PORT/v1 or https://HOST/v1, without a user, key or query",
        pattern=r"^https?://[^\s/@?]+(/[^\s?]*)?$",
    )
    model: Filled | None = key(None, "Name of the model, as the endpoint lists it.")
    verdicts: Verdicts = key(
        Verdicts.compare,
        "`compare`: each two responses, in both positions; `grade`: each response by itself, 1 to 10.",
    )
    criterion: Filled = key(
        "the better response is more helpful, honest and harmless, and follows the instructions",
        "The judge's criterion, in one clause.",
    )
    parallel_requests: int = key(8, "Requests at a time, of each process.", ge=1)


@schema
class PairsConfig:
    """Preference records made of the prompts of `data.train`, or of the scores in it."""

    method: PairsMethod = key(
        PairsMethod.scores,
        "`scores`: from scores in the data; `samples`: responses of models, scored by a judge; `delta`: "
        "responses of a stronger model, preferred to those of a weaker one; `people`: labelled by people.",
    )
    limit: int | None = key(
        None,
        "Number of different prompts to use; `scores`: of usable records, `people`: of comparisons. null: "
        "all, or 1000 for `people`.",
        ge=1,
    )
    select: PairSelection = key(
        PairSelection.best_worst,
        "Pairs of a prompt, by scores: best and worst, best and a random one, or all.",
    )
    margin: float = key(
        0.0, "Scores of a pair differ by more than this; equal scores are never a pair.", ge=0
    )
    models: list[str] = key(
        [],
        "Models that respond, as folders (also of adapters) or hub names; `delta`: the stronger one, then "
        "the weaker one. Empty: `model.path`.",
    )
    samples: int = key(4, "Responses of each model to a prompt; `delta` takes one.", ge=1)
    max_new_tokens: int = key(512, "Most tokens of a response.", ge=1)
    temperature: float = key(1.0, "Temperature of sampling; 0: the likeliest token each time.", ge=0)
    top_p: float = key(1.0, "Sample from the likeliest tokens with this sum of probabilities.", gt=0, le=1)
    top_k: int = key(0, "Sample from this number of likeliest tokens; 0: from all.", ge=0)
    unfinished: DropOrKeep = key(
        DropOrKeep.drop, "Responses that did not end within `max_new_tokens`: `drop` or `keep` (counted)."
    )
    reward_model: Filled | None = key(
        None, "Judge: folder or hub name of a sequence classification model with one output.", verbs=JUDGING
    )
    function: Filled | None = key(None, "Judge: your own function, as `module:function`.", verbs=JUDGING)
    endpoint: EndpointConfig = section(EndpointConfig, verbs=JUDGING)
    prompt_parts: int = key(
        1,
        "Parts into which the prompts are divided, by their contents; round after round takes the next.",
        ge=1,
    )
    prompt_part: int = key(0, "The part to use, of `prompt_parts`; with rounds, of the first round.", ge=0)
    rounds: int = key(
        0, "Rounds of sampling, scoring, pairing and training, by one command; 0: make pairs only.", ge=0
    )
    reference: RoundReference = key(
        RoundReference.previous,
        "Reference model of a round's training: the `first` one, or the policy of the `previous` round.",
    )
    launcher: Filled | None = key(
        None,
        "Command before `-m dpo_dist.train` in rounds, such as `accelerate launch`; null: this with several "
        "GPUs, else one process.",
    )
