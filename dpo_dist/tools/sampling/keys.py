"""Keys of how models respond and are judged: at evaluations, in `compare` and in `pairs`."""

from enum import StrEnum
from typing import Any

from dpo_dist.foundation.fields import NonEmpty, key, schema, section

RESPONDING = "compare pairs"
"""The verbs that use a judge, and whose models may be behind a server."""


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
    """Name of the model at the server; null: its name in `compare.models`, or its path."""
    parallel: int = key(16, ge=1)
    """Requests of a process at a time, each for all samples of a prompt."""
    reload: NonEmpty | None = key(None)
    """Command that loads other weights, run without a shell; `{model}` is their folder. null: you start the
    server again."""


@schema
class SamplingConfig:
    """How models respond: at evaluations, in `compare` and in `pairs`."""

    prompts: int | None = key(None, ge=0, verbs="train compare")
    """Held-out prompts, chosen by a hash; null: 128 in `compare`, else 8 at the first and last evaluation; 0:
    none at evaluations."""
    max_new_tokens: int | None = key(None, ge=1)
    """Largest number of tokens in a response; null: 512 in `pairs`, else 256, or what the model's context
    leaves."""
    temperature: float | None = key(None, ge=0)
    """0: greedy; null: 0.7 at evaluations, else 1."""
    top_p: float = key(1.0, gt=0, le=1)
    """Sample from the likeliest tokens whose probabilities add up to this."""
    top_k: int = key(0, ge=0)
    """Sample from this many of the likeliest tokens; 0: from all."""
    endpoint: ServerConfig = section(ServerConfig, verbs=RESPONDING)


@schema
class CompareConfig:
    """Two models that `dpo-dist compare` asks the same prompts of `data.eval`; judge: see `pairs`."""

    models: list[NonEmpty] = key([])
    """Two of PATH or NAME=PATH: a run, checkpoint, folder of a model or adapter, or hub name. The win rate is
    that of the second one."""


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
    """`compare`: two responses, in both orders; `grade`: each alone, from 1 to 10."""
    criterion: NonEmpty = key(
        "the better response is more helpful, honest and harmless, and follows the instructions"
    )
    """The judge's criterion, in one clause."""


@schema
class PairsConfig:
    """Preference records made of the prompts of `data.train`, or of the scores in it."""

    method: PairsMethod = key(PairsMethod.scores)
    """By `scores` of the data; `samples` of models, scored by a judge; `delta` of a stronger and a weaker
    model; `people`."""
    limit: int | None = key(None, ge=1)
    """Different prompts to use; `scores`: records, `people`: comparisons. null: all, 1000 for `people`."""
    select: PairSelection = key(PairSelection.best_worst)
    """By scores: best and worst, best and a random one, or all pairs."""
    margin: float = key(0.0, ge=0)
    """A pair's scores differ by more than this."""
    models: list[str] = key([])
    """Models that respond, as folders or hub names; `delta`: the stronger one first. Empty: `model.path`."""
    samples: int = key(4, ge=1)
    """Responses of each model to a prompt; `delta` takes one."""
    unfinished: DropOrKeep = key(DropOrKeep.drop)
    """What to do with responses that did not end within `sampling.max_new_tokens`; they are counted."""
    reward_model: NonEmpty | None = key(None, verbs=RESPONDING)
    """Judge: folder or hub name of a sequence classification model with one output."""
    function: NonEmpty | None = key(None, verbs=RESPONDING, runs="Python code of the judge is run")
    """Judge: your own function, as `module:function`."""
    endpoint: EndpointConfig = section(EndpointConfig, verbs=RESPONDING)
    part: str = key("1/1", pattern=r"^[1-9]\d*/[1-9]\d*$", accepts="I/N, from 1/N to N/N")
    """The part of the prompts to use, by their contents; each round takes the next of N."""
    rounds: int = key(0, ge=0)
    """Rounds of sampling, scoring, pairing and training, by one command; 0: make pairs only."""
    reference: RoundReference = key(RoundReference.previous)
    """Reference of a round's training: the `first` policy, or that of the `previous` round."""

    @property
    def share(self) -> tuple[int, int]:
        """Index of the part of the prompts, from 0, and the number of parts."""
        number, parts = map(int, self.part.split("/"))
        return number - 1, parts
