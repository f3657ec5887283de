"""The API for scripts and notebooks: configurations, pairs, log-probs, losses, stores, and runs' metrics.

Works in one process, on CPU or GPU; docs/python.md has examples. Log-probs come from the same packed forward
as in training (law L7).
"""

import contextlib
import csv
import faulthandler
import json
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as bars

from dpo_dist.batching.content_keys import response_keys
from dpo_dist.batching.pack import pack
from dpo_dist.config.load import load_run_config
from dpo_dist.config.losses import LossConfig, LossKind
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import Dtype, ModelConfig, RunConfig
from dpo_dist.data import (
    BadRecord,
    DataConfig,
    EncodedExample,
    Example,
    SourceConfig,
    encode_record,
    read_records,
    write_records,
)
from dpo_dist.foundation.errors import ConfigError, DpoDistError, in_one_line
from dpo_dist.foundation.process import kept_environment
from dpo_dist.foundation.signals import BY_FAULT, StopRequest
from dpo_dist.model.exactness import StartCheck, temporarily_packed
from dpo_dist.model.files import load
from dpo_dist.model.files.folder import model_folder
from dpo_dist.model.packed import PackedCausalLM, packed_logps
from dpo_dist.objective.logps import PairLogps, desensitised_weights, sum_by_response
from dpo_dist.objective.losses import BatchFacts, implicit_rewards, preference_loss
from dpo_dist.reference.store import (
    LogpStore,
    ReferenceFingerprint,
    find_fingerprint_folders,
    read_fingerprint,
)
from dpo_dist.train import main as run_training
from dpo_dist.training.reporting.metrics_log import stored_rows
from dpo_dist.training.reporting.protocols import Ask, StepDone

__all__ = [
    "Ask",
    "BatchFacts",
    "DataConfig",
    "Dtype",
    "LossConfig",
    "LossKind",
    "PairLogps",
    "RunConfig",
    "SourceConfig",
    "StepDone",
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
_Answer = TypeVar("_Answer")
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

    `dtype` is the precision of weights and forward pass; log-probs are always float32. `max_length`: tokens
    of the longest prompt plus response. Raises an error if no arrangement gives the log-probs of the
    model's own forward.
    """
    config = ModelConfig(path=path, dtype=dtype)
    device = torch.device(device)
    model = load.load_packed(model_folder(path, revision), config, max_length, device).to(device).eval()
    StartCheck(model, model, device, max_length).choose_arrangement()
    return model


def read_pairs(
    source: SourceConfig | str, tokenizer: PreTrainedTokenizerBase, data_config: DataConfig | None = None
) -> tuple[list[EncodedExample], list[BadRecord]]:
    """Read a source and encode its records as training does.

    Returns the examples in the source's order, and each record that cannot be used, with the reason; one with
    images cannot be used.
    """
    limits = data_config or DataConfig()
    pairs: list[EncodedExample] = []
    bad: list[BadRecord] = []
    for record in read_records(source):
        encoded = encode_record(record, limits, tokenizer)
        if isinstance(encoded, BadRecord):
            bad.append(encoded)
        else:
            pairs += encoded.examples()
    return pairs, bad


def token_logps(
    model: Model, pairs: Sequence[EncodedExample], micro_batch_tokens: int = 8192
) -> list[Tensor]:
    """Return the log-probs of every response, from one packed forward pass per micro-batch.

    The result has a float32 tensor [completion tokens] for each response of the first pair, then of the
    second, and so on. As in the store, it includes tokens that the loss does not count
    (`EncodedExample.trained`). Gradients are recorded unless `torch.no_grad()` is active. A causal language
    model of transformers must be in evaluation mode and is not changed; its first call checks that the
    log-probs are those of the model's own forward.
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
    """Return for each pair the sums of its responses' log-probs, over the tokens that the loss counts.

    There is at least one pair.
    """
    return _sum_pairs(pairs, token_logps(model, pairs, micro_batch_tokens), ld_alpha)


def open_stores(folder: str | Path) -> list[tuple[ReferenceFingerprint, LogpStore]]:
    """Open the folder `reference.store` for reading; return a store for each reference and its numerics."""
    root = Path(folder)
    fingerprints = map(read_fingerprint, find_fingerprint_folders(root))
    return [
        (fingerprint, LogpStore(root, fingerprint)) for fingerprint in fingerprints if fingerprint is not None
    ]


def stored_pair_logps(
    store: LogpStore, pairs: Sequence[EncodedExample], *, ld_alpha: float | None = None
) -> PairLogps:
    """Return stored log-probs of pairs, summed per response over the tokens that the loss counts."""
    values = [torch.from_numpy(values.copy()) for values in store.read(response_keys(pairs))]
    return _sum_pairs(pairs, values, ld_alpha)


@contextlib.contextmanager
def as_guest() -> Iterator[None]:
    """Leave the process as it was: environment, random states, warnings, and what else a verb changes.

    `join_world` does so for Accelerate and DeepSpeed, the console for streams and logging.
    """
    had_bars = bars.is_progress_bar_enabled()
    had_fault_handler = faulthandler.is_enabled()
    had_cudnn = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    states = (random.getstate(), np.random.get_state())
    cell_size = csv.field_size_limit()
    has_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    gpus = [torch.cuda.current_device()] if has_cuda else []
    bars.disable_progress_bar()  # in a notebook each would stay as an output of its own
    try:
        with kept_environment(), warnings.catch_warnings(), torch.random.fork_rng(gpus):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        csv.field_size_limit(cell_size)
        torch.backends.cuda.enable_cudnn_sdp(had_cudnn)
        if had_bars:
            bars.enable_progress_bar()
        if not had_fault_handler:
            faulthandler.disable()


Records: TypeAlias = Iterable[Any]
"""Records as mappings, or a `datasets.Dataset`."""


def train(
    words: Sequence[str],
    *,
    train: Records | None = None,
    eval: Records | None = None,  # noqa: A002  (as the key data.eval)
    on_row: Callable[[dict[str, float]], bool | None] | None = None,
    on_step: Callable[[StepDone], Ask | None] | None = None,
) -> dict[str, Any]:
    """Train as the command `dpo-dist train` with these words does; return the run's summary.

    Training continues from the last checkpoint if there is one.

    Args:
        words: of the command line, as in `load_run_config`.
        train: a list of records, or a `datasets.Dataset`, in place of `data.train`. The records are written
            below `data.cache`, to a file named by their content, so that the same call resumes the run.
        eval: records in place of `data.eval`.
        on_row: called on rank 0 with each metrics row, after the row is recorded. If it returns true, the run
            stops with a checkpoint, after the next step at the latest. If it raises, the run stops in the
            same way, and `train` raises the exception at the end.
        on_step: called on rank 0 after each step; returns what it asks for, or None: `Ask.log` (a row of
            metrics), `Ask.save` (a checkpoint) or `Ask.stop`. All ranks do what it asks. If it raises, the
            run stops after that step, as for `on_row`.

    Returns:
        The content of summary.json, and `run_dir`. `exit` is `completed` or `preempted`; `stopped_by` has
        the reason of a stop.
    """
    sources = {"data.train": train, "data.eval": eval}
    records_by_key = {key: records for key, records in sources.items() if records is not None}
    for key, records in records_by_key.items():
        if not (isinstance(records, list) or hasattr(records, "with_format")):
            remedy = "give a list of mappings, or a datasets.Dataset, as Dataset.from_pandas makes it; pass "
            remedy += f"a path as a word: {key}=[pairs.jsonl]"
            raise ConfigError("records must be a list", where=key, got=type(records).__name__, remedy=remedy)
    if on_row is not None and not callable(on_row):
        raise ConfigError("on_row must be a function", where="on_row", got=repr(on_row), remedy="pass one")
    base = load_run_config([*words, *(f"{key}=[records.jsonl]" for key in records_by_key)])
    folder = Path(base.data.cache) / "records"
    overrides = dict[str, list[dict[str, str]]]()
    for key, records in records_by_key.items():
        source = {"path": str(write_records(records, folder, key))}
        if base.model.images is not None:
            source["images"] = str(Path.cwd())  # paths of images mean what they mean to the script
        overrides[key] = [source]
    words = [*words, *(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items())]
    config = load_run_config(words, verb="train")
    faults = list[Exception]()
    request = StopRequest(config.trainer.stop_after_steps, config.trainer.max_seconds)

    followers = (
        _caught(on_row, faults, request, True),
        _caught(on_step, faults, request, Ask.stop),
    )
    with as_guest():
        run_training(config, *followers, request)
    if faults:
        raise faults[0]
    summary = read_summary(str(config.run.dir))
    _, is_fault, fault = (summary.get("stopped_by") or "").partition(BY_FAULT)
    if is_fault:  # on the other ranks
        raise DpoDistError("the script failed on rank 0", got=fault, remedy="see the error of rank 0")
    return {"run_dir": str(config.run.dir), **summary}


def _caught(
    function: Callable[[T], Any] | None, faults: list[Exception], request: StopRequest, stop: _Answer
) -> Callable[[T], _Answer] | None:
    """Return a function that keeps what `function` raises in `faults`, and from then on asks to `stop`."""
    if function is None:
        return None

    def call(value: T) -> _Answer:
        try:
            return stop if faults else function(value)
        except Exception as fault:
            faults.append(fault)
            request.ask(BY_FAULT + in_one_line(fault))
            return stop

    return call


def read_metrics(run_dir: str | Path) -> list[dict[str, float]]:
    """Return a run's metrics rows, one for each logged step and each evaluation; the run may be training."""
    run = RunFolder(Path(run_dir))

    def read(file: Path) -> list[dict[str, float]]:
        file.stat()
        return list(stored_rows(run))

    return _read(run.log_history, read)


def read_summary(run_dir: str | Path) -> dict[str, Any]:
    """Return the content of summary.json, which a run writes at its end."""
    return _read(RunFolder(Path(run_dir)).summary, lambda file: dict(json.loads(file.read_text())))


def _read(file: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(file)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "a file of this run cannot be read",
            where=str(file),
            got=f"{type(error).__name__}: {error}",
            remedy="check that the folder is a run directory; a run writes its summary at its end",
        ) from error


def _sum_pairs(pairs: Sequence[EncodedExample], logps: Sequence[Tensor], ld_alpha: float | None) -> PairLogps:
    """Return the log-probs summed per response over the tokens that the loss counts."""
    if not pairs:
        raise ValueError("pairs is empty: pass at least one pair")
    batch = pack(pairs, response_keys(pairs))
    values = torch.cat(list(logps))
    device = values.device
    if batch.mask is not None:
        values = values[torch.from_numpy(batch.mask).to(device)]
    weights = None if ld_alpha is None else desensitised_weights(batch.pair_tokens, ld_alpha).to(device)
    ranking = None if batch.ranking is None else batch.ranking.to(device)
    return sum_by_response(values, batch.response_tokens.to(device), ranking, weights)
