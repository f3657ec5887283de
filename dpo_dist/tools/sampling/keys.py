"""Keys of how models respond and are judged: at evaluations, in `compare` and in `pairs`."""

from enum import StrEnum
from typing import Any

from dpo_dist.foundation.fields import NonEmpty, key, schema, section

RESPONDING = "compare pairs"
"""The verbs that use a judge, and whose models may be behind a server."""


@schema
class SamplesConfig:
    """Responses of the policy to held-out prompts at evaluations."""

    prompts: int | None = key(None, ge=0)
    """Prompts of the evaluation data that the policy responds to at every evaluation; null: 8, before the
    first step and after the last; 0: none."""


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
    """Sampling temperature; 0: greedy; null: 0.7 at evaluations, else 1."""
    top_p: float = key(1.0, gt=0, le=1)
    """Sample from the likeliest tokens whose probabilities add up to this."""
    top_k: int = key(0, ge=0)
    """Sample from this many of the likeliest tokens; 0: from all."""
    endpoint: ServerConfig = section(ServerConfig, verbs=RESPONDING)


@schema
class CompareConfig:
    """Two models that `dpo-dist compare` asks the same prompts of `data.eval`; judge: see `pairs`."""

    models: list[NonEmpty] = key([])
    """The models, each PATH or NAME=PATH: a run directory (its trained model), a checkpoint, a folder of a
    model or an adapter, or a hub name. The win rate is that of the second one over the first."""
    prompts: int = key(128, ge=1)
    """Number of different prompts, chosen by a hash of the prompt; all if there are fewer."""


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
    function: NonEmpty | None = key(None, verbs=RESPONDING, runs="Python code of the judge is run")
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
