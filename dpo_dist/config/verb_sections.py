"""Keys of `compare`, `doctor`, `encode`, `export`, `pairs`, `plan` and `sweep`, of samples and sampling."""

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from dpo_dist.foundation.fields import NonEmpty, as_entry, key, schema, section

RESPONDING = "compare pairs"
"""The verbs that use a judge, and whose models may be behind a server."""


@schema
class SamplesConfig:
    """Responses of the policy to held-out prompts at evaluations."""

    prompts: int | None = key(None, ge=0)
    """Prompts of the evaluation data that the policy responds to at every evaluation while this takes at most
    a minute and a tenth of the training time; null: 8, before the first step and after the last; 0: none."""


_URL: Any = {
    "accepts": "http://HOST:PORT/v1 or https://HOST/v1, without a user, key or query",
    "pattern": r"^(?i:https?)://[^\s/@?]+(/[^\s?]*)?$",
}


@schema
class ServerConfig:
    """A server with the OpenAI API, such as vLLM, that generates the responses; it gets the prompts."""

    url: str | None = key(None, **_URL)
    """Address up to the version: `http://localhost:8000/v1`; null: this program generates."""
    model: NonEmpty | None = key(None)
    """Name under which the server serves the model; null: its name in `compare.models`, or its path."""
    parallel: int = key(16, ge=1)
    """Requests that each process sends at a time; one asks for all samples of a prompt."""
    reload: NonEmpty | None = key(None)
    """Command after which the server serves other weights, such as a new round's, run without a shell;
    `{model}` is their folder. null: you start the server again."""


@schema
class SamplingConfig:
    """How models respond: at evaluations (`samples`), in `compare` and in `pairs`."""

    max_new_tokens: int | None = key(None, ge=1)
    """Largest number of tokens in a response; null: 512 in `pairs`, else 256, or, if that is less, what the
    prompt leaves of the model's context."""
    temperature: float | None = key(None, ge=0)
    """Sampling temperature; 0: greedy; null: 0.7 at evaluations, else 1. `compare` estimates the KL without
    bias only at 1."""
    top_p: float = key(1.0, gt=0, le=1)
    """Sample from the likeliest tokens whose probabilities add up to this."""
    top_k: int = key(0, ge=0)
    """Sample from this many of the likeliest tokens; 0: from all."""
    endpoint: ServerConfig = section(ServerConfig, verbs=RESPONDING)


@schema
class CompareConfig:
    """Models that `dpo-dist compare` asks the same prompts of `data.eval`; judge: see `pairs`."""

    models: list[NonEmpty] = key([])
    """Models to compare, each PATH or NAME=PATH: a run directory (its trained model), a checkpoint, a folder
    of a model or an adapter, or a hub name. The first is the base of KL and win rates."""
    prompts: int = key(128, ge=1)
    """Number of different prompts, chosen by a hash of the prompt; all if there are fewer."""


FailOn = StrEnum("FailOn", ["warning", "error", "never"])


@schema
class DoctorConfig:
    """How `dpo-dist doctor` examines the data."""

    fail_on: FailOn = key(FailOn.warning)
    """Lowest level of a finding that makes the exit code 1."""
    benchmarks: list[str] = key([])
    """Files of benchmark prompts, .jsonl or .txt, that training data should not contain."""
    texts: bool = key(True)
    """Show texts of records on the page; they are hidden until clicked."""


@schema
class MemberConfig:
    """One entry of `export.average`; a bare string is its `path`."""

    path: NonEmpty = key(...)
    """Folder of a whole model, such as `export` writes."""
    weight: float = key(1.0, gt=0)
    """Weight in the mean; the weights are divided by their sum."""


Member = Annotated[
    MemberConfig, BeforeValidator(as_entry("path"), json_schema_input_type=MemberConfig | NonEmpty)
]
ExportedWeights = StrEnum("ExportedWeights", ["last", "ema"])
ExportTool = StrEnum("ExportTool", {"lm_eval": "lm-eval", "vllm": "vllm"})


@schema
class ExportConfig:
    """The model folder that `dpo-dist export` writes from checkpoints of `run.dir`."""

    checkpoint: str | None = key(
        None,
        accepts="latest, best, or the name of a folder in checkpoints/, such as step-000100",
        pattern=r"^(latest|best|step-\d{1,18})$",
    )
    """`latest`, `best` (by `trainer.keep_best`), or a checkpoint's name: `step-000100`; null: the checkpoint
    of `model/` (`trainer.final`)."""
    weights: ExportedWeights = key(ExportedWeights.last)
    """`last`: the weights of the checkpoint's step; `ema`: their moving average (`trainer.ema_decay`)."""
    average: list[Member] = key([])
    """Write the mean of whole models in place of a checkpoint: their folders, such as `export` writes."""
    merge: bool = key(False)
    """Merge an adapter into its base, and write one model."""
    dtype: Literal["bf16", "fp16", "fp32"] | None = key(None)
    """Precision of the written weights; null: `model.dtype`, but weights of a merged base keep the precision
    of its files."""
    check: bool = key(True)
    """Before the folder gets its name, load it by transformers and compare its weights with the trained
    ones."""
    output: NonEmpty | None = key(None)
    """Folder to write, which must not exist; null: `<run.dir>/exported/<checkpoint>`, followed by `-ema` or
    `-merged`; with `export.average`, `<run.dir>/exported/average`."""
    tool: ExportTool | None = key(None)
    """Print the command by which `lm-eval` or `vllm` reads `model/`, or a folder that other keys of `export`
    name."""
    push_to: str | None = key(None, accepts="ORG/NAME", pattern=r"^[\w.-]+/[\w.-]+$")
    """Hub repository for the folder, created as a private one if it is missing; a folder that exists is
    uploaded as it is. The files are listed, and sent only with `export.confirm`."""
    confirm: bool = key(False)
    """Send the listed files to `export.push_to`."""


PairsMethod = StrEnum("PairsMethod", ["scores", "samples", "delta", "people"])
PairSelection = StrEnum("PairSelection", ["best_worst", "best_random", "all_pairs"])
DropOrKeep = StrEnum("DropOrKeep", ["drop", "keep"])
RoundReference = StrEnum("RoundReference", ["first", "previous"])
Verdicts = StrEnum("Verdicts", ["compare", "grade"])


@schema
class EndpointConfig:
    """A judge behind an OpenAI-compatible API; prompts and responses are sent to it."""

    url: str | None = key(None, **_URL)
    """Address up to the version: `http://localhost:8000/v1`; null: no such judge."""
    model: NonEmpty | None = key(None)
    """Name of the model, as the endpoint lists it; needed with `url`."""
    verdicts: Verdicts = key(Verdicts.compare)
    """`compare`: two responses at a time, in both orders; `grade`: each response alone, from 1 to 10."""
    criterion: NonEmpty = key(
        "the better response is more helpful, honest and harmless, and follows the instructions"
    )
    """The judge's criterion, in one clause."""


@schema
class PairsConfig:
    """Preference records made of the prompts of `data.train`, or of the scores in it."""

    method: PairsMethod = key(PairsMethod.scores)
    """`scores`: from scores in the data; `samples`: responses of models, scored by a judge; `delta`:
    responses of a stronger model, preferred to those of a weaker one; `people`: labelled by people."""
    limit: int | None = key(None, ge=1)
    """Number of different prompts to use; `scores`: of usable records, `people`: of comparisons. null: all,
    or 1000 for `people`."""
    select: PairSelection = key(PairSelection.best_worst)
    """Pairs of a prompt, by scores: best and worst, best and a random one, or all."""
    margin: float = key(0.0, ge=0)
    """Make a pair only if its scores differ by more than this; equal scores never make one."""
    models: list[str] = key([])
    """Models that respond, as folders (also of adapters) or hub names; `delta`: the stronger one, then the
    weaker one. Empty: `model.path`."""
    samples: int = key(4, ge=1)
    """Responses of each model to a prompt; `delta` takes one."""
    unfinished: DropOrKeep = key(DropOrKeep.drop)
    """What to do with responses that did not end within `sampling.max_new_tokens`; they are counted."""
    reward_model: NonEmpty | None = key(None, verbs=RESPONDING)
    """Judge: folder or hub name of a sequence classification model with one output."""
    function: NonEmpty | None = key(None, verbs=RESPONDING)
    """Judge: your own function, as `module:function`."""
    endpoint: EndpointConfig = section(EndpointConfig, verbs=RESPONDING)
    prompt_parts: int = key(1, ge=1)
    """Divide the prompts into this many parts, by their contents; each round takes the next part."""
    prompt_part: int = key(0, ge=0)
    """The part to use, of `prompt_parts`; with rounds, of the first round."""
    rounds: int = key(0, ge=0)
    """Rounds of sampling, scoring, pairing and training, by one command; 0: make pairs only."""
    reference: RoundReference = key(RoundReference.previous)
    """Reference model of a round's training: the `first` one, or the policy of the `previous` round."""
    launcher: NonEmpty | None = key(None)
    """Command that starts the processes of a round, written before `-m dpo_dist VERB`; it must return their
    exit code; null: `dpo-dist launch` with several GPUs, else one process."""


@schema
class EncodeConfig:
    """The share of the data that one `dpo-dist encode` of several encodes."""

    part: str = key("1/1", pattern=r"^[1-9]\d*/[1-9]\d*$", accepts="I/N, from 1/N to N/N")
    """The part of the data to encode, in an array of N jobs; the job that finds all parts joins them."""


GpuKind = Literal["h100-80g", "h200-141g", "b200-180g", "a100-80g", "a100-40g", "l40s-48g", "rtx4090-24g"]


@schema
class PlanConfig:
    """The machines that `plan`, and two lines of `train --check`, compute for."""

    gpus: int | None = key(None, ge=1)
    """Number of GPUs, 8 to a node; null: those of this machine, or else 8."""
    gpu: GpuKind | None = key(None)
    """Kind of the GPUs; null: this machine's, measured, or else h100-80g."""
    price: float | None = key(None, gt=0, verbs="plan")
    """Price of one GPU hour, in any currency."""
    pairs: int | None = key(None, ge=1)
    """Pairs in an epoch; null: counted in local `data.train`, or from the cards of the presets' datasets."""
    tokens_per_pair: float | None = key(None, gt=1)
    """Tokens of a pair, its prompt counted once; null: found as `pairs` is."""
    suggest: bool = key(False, verbs="plan")
    """Also search settings that fit into memory, and print those with the shortest epoch."""


@schema
class SweepConfig:
    """How the points of a sweep are run."""

    parallel: int | None = key(None, ge=1)
    """Points that train at a time, each on an equal part of the GPUs; null: as many as GPUs, or 1 without."""
    launcher: NonEmpty | None = key(None)
    """Command before `-m dpo_dist train` that starts the processes of a point; null:
    `dpo-dist launch` if a point has several GPUs, else one process that imports nothing again."""
    trials: int | None = key(None, ge=1, le=1000)
    """Points to train of a search, which samples the swept values by optuna; null: train all combinations."""
    by: NonEmpty | None = key(None)
    """Metric that a search improves, in the last evaluation of a run: `eval_rewards/accuracies`."""
