"""Write a model folder from a checkpoint of a run, with the card that training would have written."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpo_dist.batching.pack import Sequences, pack
from dpo_dist.config.identity import settings
from dpo_dist.config.run_folder import RunFolder, step_of
from dpo_dist.config.schema import AttentionBackend, Dtype, RunConfig
from dpo_dist.config.verb_options import ExportedWeights
from dpo_dist.data.build import prepare_dataset, tokenizer_digest
from dpo_dist.data.dataset import open_dataset
from dpo_dist.distributed.checkpoint import damaged_checkpoint, read_state
from dpo_dist.distributed.export import DTYPES, Exported, export_checkpoint, trained_tokenizer
from dpo_dist.foundation.errors import CheckpointError, ConfigError, DataError, RunOutcome, first_line
from dpo_dist.foundation.files import staged_folder
from dpo_dist.insight.console import Console
from dpo_dist.insight.metrics.log import read_latest_rows
from dpo_dist.insight.recorder import spared
from dpo_dist.model.adapter_files import start_folder
from dpo_dist.model.exactness import CheckedModel, settle
from dpo_dist.model.folder import is_adapter, model_folder
from dpo_dist.model.load import load_packed
from dpo_dist.model.lora import adapted_layers, add_adapter
from dpo_dist.model.merge import write_mean
from dpo_dist.model.save import writing_errors
from dpo_dist.reference.digest import digest_model
from dpo_dist.training.finish import run_card

_COARSE = {"BF16": torch.bfloat16, "F16": torch.float16}
_CPU = torch.device("cpu")
_READ, _SCORED = 16, 4
# Between two orders of the same float32 sums, in nats per token.
_FLOOR = 1e-4
# Of the drift that rounding the same weights causes; sums of rounded weights round once more.
_FACTOR = 4.0


def export_model(config: RunConfig, checkpoint: Path, output: Path, console: Console) -> None:
    """Write `output` from a checkpoint, checked, whole or not at all."""
    _check_base(config, checkpoint)
    console.say(f"reading {checkpoint}")
    check = None
    if config.export.check:  # pairs that cannot be read are an error before anything is written
        check = partial(check_exported, pairs=read_pairs(config), config=config, say=console.say)

    def card() -> str:
        found = [""]
        with spared("the model card", console.say):
            found = [_card(config, checkpoint, console)]
        return found[0]

    export_checkpoint(checkpoint, output, config, card, check, replaces=False)


def export_average(config: RunConfig, members: Sequence[Path], output: Path) -> None:
    """Write the weighted mean of whole models, whole or not at all."""
    given = [member.weight for member in config.export.average]
    shares = [(weight / sum(given), member) for weight, member in zip(given, members, strict=True)]
    dtype = None if config.export.dtype is None else DTYPES[config.export.dtype]
    with writing_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with staged_folder(output, replaces=False) as temporary:
            write_mean(temporary, shares, dtype)


def _check_base(config: RunConfig, checkpoint: Path) -> None:
    """Check that files which become part of the result are those that training started from.

    They are the base of a merged adapter, and the adapter below a new one. The check of the written folder
    reads the same files, so it would not see the difference.
    """
    adapter = config.model.adapter
    if adapter is None or not (config.export.merge or adapter.on_top):
        return
    recorded = _state(checkpoint).get("model")
    base, store = model_folder(config.model.path, config.model.revision), Path(config.reference.store)
    code, start = config.model.trust_remote_code, start_folder(config.model)
    found = digest_model(base, store, remote_code=code, adapter=start).digest
    if recorded != found:
        raise ConfigError(
            "the model that this run started from has changed since",
            where="model.path" if adapter.path is None else "model.path, model.adapter.path",
            got=f"digest {found}",
            expected=f"digest {recorded}",
            remedy="restore its files"
            + ("" if adapter.on_top else ", or set export.merge=false to write the adapter by itself"),
        )


def _state(checkpoint: Path) -> Mapping[str, Any]:
    """Return the state of a checkpoint, which its run may remove meanwhile."""
    try:
        return read_state(checkpoint)
    except (OSError, ValueError) as error:
        raise damaged_checkpoint(checkpoint, [first_line(error)]) from error


def _card(config: RunConfig, checkpoint: Path, console: Console) -> str:
    """Return the model card of a checkpoint."""
    folder, step, state = RunFolder.of(config), step_of(checkpoint.name), _state(checkpoint)
    is_end = step == state["steps"]
    summary = {
        "exit": (RunOutcome.completed if is_end else RunOutcome.preempted).value,
        "steps": step,
        "pairs_seen": state["pairs_seen"],
        "reference": state["reference_report"],
        "settings": settings(config),
        "data": state["counts"],
    }
    rows = [row for row in read_latest_rows(folder) if row["step"] <= state["step"]]
    versions = json.loads(folder.environment.read_bytes())["packages"]
    is_evaluated = is_end and config.export.weights is ExportedWeights.last
    written = replace(config, model=replace(config.model, adapter=None)) if config.export.merge else config
    return run_card(written, rows, summary, console, versions, is_evaluated=is_evaluated)


def read_pairs(config: RunConfig) -> list[Sequences]:
    """Return the shortest of the first pairs of the training data, as training encodes them."""
    source = config.data.train[0]
    first = replace(source, limit=min(_READ, source.limit or _READ))
    try:
        base = model_folder(config.model.path, config.model.revision)
        files, tokenizer = trained_tokenizer(base, start_folder(config.model), config)
        digest = tokenizer_digest(files)
        dataset = open_dataset(prepare_dataset([first], config.data, tokenizer, digest), config.data)
    except (ConfigError, DataError, OSError) as error:
        raise ConfigError(
            "the training pairs or the base of the check cannot be read",
            where="export.check",
            got=f"{source.path}, {config.model.path}: {first_line(error)}",
            remedy="make them available, or set export.check=false",
        ) from error
    pairs = [dataset.sequences(index) for index in range(len(dataset))]
    return sorted(pairs, key=lambda pair: len(pair.prompt_ids) + sum(map(len, pair.responses)))[:_SCORED]


def check_exported(
    exported: Exported, pairs: Sequence[Sequences], config: RunConfig, say: Callable[[str], None]
) -> None:
    """Score training pairs with the written folder and with the trained weights, in float32 on the CPU.

    Memory is that of one model in float32. `exported`: before it has its name.
    """
    found, dtype = _plain_logps(exported, config, pairs), _coarsest_dtype(exported.folder)
    expected, rounded, base = _trained_logps(exported, config, pairs, dtype)
    written, rounding, change = (
        float((one - other).abs().mean())
        for one, other in ((found, expected), (rounded, expected), (expected, base))
    )
    responses = sum(len(pair.responses) for pair in pairs)
    drift = (
        f"log-probs of {responses} responses differ from those of the trained "
        f"weights by {written:.2g} nats a token (rounding: {rounding:.2g}; the base: {change:.2g})"
    )
    if not written <= _FLOOR + _FACTOR * rounding:  # not ">", which accepts nan
        raise CheckpointError(
            "the written folder computes other log-probs than the trained weights",
            where=str(exported.folder),
            got=drift,
            expected=f"at most {_FLOOR + _FACTOR * rounding:.2g}",
            remedy="report it with the run's config.yaml; export.check=false writes the folder all the same",
        )
    say(f"checked: {drift}")
    if rounding > change / 4 and dtype is not torch.float32:
        say("warning: rounding is a large part of what training changed: export.dtype=fp32 keeps it")


def _coarsest_dtype(folder: Path) -> torch.dtype:
    """Return the precision of the written weights; of several, the one that rounds most."""
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            found |= {content.get_slice(name).get_dtype() for name in content.keys()}  # noqa: SIM118
    return next((dtype for name, dtype in _COARSE.items() if name in found), torch.float32)


@torch.no_grad()
def _plain_logps(exported: Exported, config: RunConfig, pairs: Sequence[Sequences]) -> Tensor:
    """Return log-probs by a plain forward of each response."""
    load = partial(AutoModelForCausalLM.from_pretrained, trust_remote_code=config.model.trust_remote_code)
    if is_adapter(exported.folder):
        base = load(exported.base, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, exported.folder)
    else:
        model = load(exported.folder, dtype=torch.float32)
    model.eval()
    logps = []
    for pair in pairs:
        for response in pair.responses:
            ids = torch.from_numpy(np.concatenate((pair.prompt_ids, response))).long()
            logits = model(input_ids=ids[None]).logits[0, len(pair.prompt_ids) - 1 : -1].float()
            targets = ids[len(pair.prompt_ids) :, None]
            logps.append(logits.log_softmax(-1).gather(1, targets)[:, 0])
    return torch.cat(logps)


@torch.no_grad()
def _trained_logps(
    exported: Exported, config: RunConfig, pairs: Sequence[Sequences], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs by the packed forward of training: of the trained weights, rounded ones, the base."""
    on_cpu = replace(  # without what needs a GPU or changes only speed and memory
        config.model,
        dtype=Dtype.fp32,
        attention=AttentionBackend.auto,
        quantization=None,
        liger=False,
        compile=False,
        activation_offload=False,
    )
    model = load_packed(exported.base, on_cpu, config.data.max_length, _CPU).eval()
    settle(CheckedModel(model, model, _CPU, config.data.max_length))
    keys = np.zeros((sum(len(pair.responses) for pair in pairs), 2), dtype=np.uint64)
    batch = pack(pairs, keys)
    base = model(batch)
    if config.model.adapter is not None:
        add_adapter(model, config.model, config.trainer.seed, exported.start)
    for name, weight in model.causal_lm.named_parameters():
        if weight.requires_grad:
            weight.copy_(exported.read(name))
    expected = model(batch)
    if not is_adapter(exported.folder):  # what is rounded are the sums
        for layer in adapted_layers(model):
            layer.merge()
    for name, weight in model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name or not is_adapter(exported.folder):
            weight.copy_(weight.to(dtype))
    return expected, model(batch), base
