"""The API for scripts and notebooks: configurations, pairs, log-probs, losses, stores and metrics of runs.

One process, on CPU or GPU. docs/python.md has examples. Log-probs come from the same packed forward as in
training (law L7).
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_dist.batching.example import Example, response_keys
from dpo_dist.batching.pack import pack
from dpo_dist.config.load import load_run_config
from dpo_dist.config.losses import LossConfig, LossKind
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import DataConfig, Dtype, ModelConfig, RunConfig, SourceConfig
from dpo_dist.data.encode import EncodedExample, encode_record
from dpo_dist.data.formats import read_records
from dpo_dist.data.read.files import write_records
from dpo_dist.data.records import BadRecord
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.exactness import StartCheck, temporarily_packed
from dpo_dist.model.files import load
from dpo_dist.model.files.folder import model_folder
from dpo_dist.model.packed import PackedCausalLM, packed_logps
from dpo_dist.objective.logps import PairLogps, desensitised_weights, sum_by_response
from dpo_dist.objective.losses import BatchFacts, implicit_rewards, preference_loss
from dpo_dist.reference.store import LogpStore, ReferenceFingerprint, fingerprint_folders, read_fingerprint
from dpo_dist.train import main as run_training
from dpo_dist.training.reporting.metrics_log import read_rows

__all__ = [
    "BatchFacts",
    "DataConfig",
    "Dtype",
    "LossConfig",
    "LossKind",
    "PairLogps",
    "RunConfig",
    "SourceConfig",
    "implicit_rewards",
    "load_model",
    "load_run_config",
    "load_tokenizer",
    "open_stores",
    "pair_logps",
    "preference_loss",
    "read_metrics",
    "read_pairs",
    "read_summary",
    "response_keys",
    "stored_pair_logps",
    "token_logps",
    "train",
]

T = TypeVar("T")
Model: TypeAlias = PackedCausalLM | PreTrainedModel


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder or of a model on the Hugging Face Hub."""
    return load.load_tokenizer(model_folder(path, revision), ModelConfig(path=path))


def load_model(
    path: str,
    revision: str | None = None,
    *,
    dtype: Dtype = Dtype.fp32,
    device: str | torch.device = "cpu",
    max_length: int = 1024,
) -> PackedCausalLM:
    """Load a model folder, or a model on the Hugging Face Hub, in evaluation mode.

    `dtype` is the precision of weights and forward pass, log-probs are float32 in either; `max_length` the
    tokens of the longest prompt plus response. A model for which packed log-probs are not exact is an error.
    """
    config, device = ModelConfig(path=path, dtype=dtype), torch.device(device)
    model = load.load_packed(model_folder(path, revision), config, max_length, device).to(device).eval()
    StartCheck(model, model, device, max_length).choose_arrangement()
    return model


def read_pairs(
    source: SourceConfig | str, tokenizer: PreTrainedTokenizerBase, data_config: DataConfig | None = None
) -> tuple[list[EncodedExample], list[BadRecord]]:
    """Read a source and encode its records as training does, in the order of the source.

    Returns the examples, and the records that cannot be used, each with its reason.
    """
    limits = data_config or DataConfig()
    pairs: list[EncodedExample] = []
    bad: list[BadRecord] = []
    for record in read_records(source):
        encoded = record if isinstance(record, BadRecord) else encode_record(record, limits, tokenizer)
        if isinstance(encoded, BadRecord):
            bad.append(encoded)
        else:
            pairs += encoded.examples()
    return pairs, bad


def token_logps(
    model: Model, pairs: Sequence[EncodedExample], micro_batch_tokens: int = 8192
) -> list[Tensor]:
    """Return the log-probs of every response, in one packed forward pass per micro-batch.

    float32 [completion tokens] each, response after response of the first pair, of the second, and so on.
    Tokens that the loss does not count (`EncodedExample.trained`) are included, as in the store. Gradients
    are recorded unless `torch.no_grad()` is active. A causal language model of transformers, in evaluation
    mode, is left as it was; its first call checks that packed log-probs are exact.
    """
    longest = max((len(pair.prompt_ids) + max(map(len, pair.responses)) for pair in pairs), default=0)
    examples = [Example(pair.prompt_ids, pair.responses) for pair in pairs]
    with temporarily_packed(model, longest) as packed:
        return packed_logps(packed, examples, micro_batch_tokens)


def pair_logps(
    model: Model,
    pairs: Sequence[EncodedExample],
    micro_batch_tokens: int = 8192,
    *,
    ld_alpha: float | None = None,
) -> PairLogps:
    """Sum `token_logps` per response, over the tokens that the loss counts; needs at least one pair."""
    return _summed(pairs, token_logps(model, pairs, micro_batch_tokens), ld_alpha)


def open_stores(folder: str | Path) -> list[tuple[ReferenceFingerprint, LogpStore]]:
    """Open the log-probs below `reference.store` for reading, one store for each model and its numerics."""
    root = Path(folder)
    read = map(read_fingerprint, fingerprint_folders(root))
    return [(known, LogpStore(root, [known])) for known in read if known is not None]


def stored_pair_logps(
    store: LogpStore, pairs: Sequence[EncodedExample], *, ld_alpha: float | None = None
) -> PairLogps:
    """Return stored log-probs of pairs, summed per response over the tokens that the loss counts."""
    values = [torch.from_numpy(values.copy()) for values in store.read(response_keys(pairs))]
    return _summed(pairs, values, ld_alpha)


Records: TypeAlias = Iterable[Mapping[str, Any]]


def train(
    words: Sequence[str],
    *,
    train: Records | None = None,
    eval: Records | None = None,  # noqa: A002  (as the key data.eval)
    on_row: Callable[[dict[str, float]], bool | None] | None = None,
) -> dict[str, Any]:
    """Train as a command with these words does, from the last checkpoint if there is one; return its summary.

    Args:
        words: as of `load_run_config`.
        train: a list of records, or a `datasets.Dataset`, in place of `data.train`. They are written below
            `data.cache`, to a file that their content names: the same call resumes the run.
        eval: the same in place of `data.eval`.
        on_row: called on rank 0 with each metrics row of steps and evaluations, once it is recorded. If it
            returns true, the run stops with a checkpoint, after the next step at the latest. If it
            raises, the run stops in the same way, and the exception is raised at the end.

    Returns:
        The content of summary.json, and `run_dir`. `exit` is `completed`, or `preempted`, by `stopped_by`.
    """
    named = {"data.train": train, "data.eval": eval}
    given = {key: records for key, records in named.items() if records is not None}
    for key, records in given.items():
        if isinstance(records, str | Path | Mapping):
            remedy = f"give a list of mappings; a path is in the words: {key}=[pairs.jsonl]"
            raise ConfigError("records are a list", where=key, got=type(records).__name__, remedy=remedy)
    if on_row is not None and not callable(on_row):
        raise ConfigError("it is no function", where="on_row", got=repr(on_row), remedy="give a function")
    cache = Path(load_run_config([*words, *(f"{key}=[records.jsonl]" for key in given)]).data.cache)
    files = {key: write_records(records, cache / "records", key) for key, records in given.items()}
    sources = [f"{key}=[{json.dumps(str(file), ensure_ascii=False)}]" for key, file in files.items()]
    config, faults = load_run_config([*words, *sources], verb="train"), list[Exception]()

    def stop_requested(row: dict[str, float]) -> bool:
        try:
            return bool(faults or (on_row is not None and on_row(row)))
        except Exception as fault:
            faults.append(fault)
            return True

    run_training(config, stop_requested)
    if faults:
        raise faults[0]
    return {"run_dir": str(config.run.dir), **read_summary(str(config.run.dir))}


def read_metrics(run_dir: str | Path) -> list[dict[str, float]]:
    """Return the metrics rows of a run (log_history.json), one for each logged step and each evaluation."""
    return _read(RunFolder(Path(run_dir)).log_history, read_rows)


def read_summary(run_dir: str | Path) -> dict[str, Any]:
    """Return summary.json of a run that has ended."""
    return _read(RunFolder(Path(run_dir)).summary, lambda file: dict(json.loads(file.read_text())))


def _read(file: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(file)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "this file of the run cannot be read",
            where=str(file),
            got=f"{type(error).__name__}: {error}",
            remedy="check that the folder is a run directory; a run writes its summary at its end",
        ) from error


def _summed(pairs: Sequence[EncodedExample], logps: Sequence[Tensor], ld_alpha: float | None) -> PairLogps:
    """Sum the log-probs of whole responses over the tokens that the loss counts."""
    if not pairs:
        raise ValueError("log-probs of at least one pair are needed")
    batch, values = pack(pairs, response_keys(pairs)), torch.cat(list(logps))
    device = values.device
    if batch.mask is not None:
        values = values[torch.from_numpy(batch.mask).to(device)]
    weights = None if ld_alpha is None else desensitised_weights(batch.pair_tokens, ld_alpha).to(device)
    ranking = None if batch.ranking is None else batch.ranking.to(device)
    return sum_by_response(values, batch.response_tokens.to(device), ranking, weights)
