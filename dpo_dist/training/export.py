"""Write a model folder from a checkpoint of a run, with the card that training would have written."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from dpo_dist.config.schema import AttentionBackend, Dtype, ModelConfig, RunConfig
from dpo_dist.config.verb_options import ExportedWeights
from dpo_dist.data.build import prepare_dataset, tokenizer_digest
from dpo_dist.data.dataset import open_dataset
from dpo_dist.distributed.checkpoint_files import read_state
from dpo_dist.distributed.export import Exported, Members, export_models, trained_tokenizer
from dpo_dist.distributed.manifest import damaged_checkpoint
from dpo_dist.foundation.errors import CheckpointError, ConfigError, DataError, RunOutcome, first_line
from dpo_dist.foundation.files import final_name, read_small, temporary_folder
from dpo_dist.insight.console import Console
from dpo_dist.insight.metrics.log import package_versions, read_latest_rows
from dpo_dist.insight.recorder import spared
from dpo_dist.model.adapter_files import start_folder
from dpo_dist.model.adapter_weights import shared_weights, stack, write_adapter
from dpo_dist.model.exactness import CheckedModel, settle
from dpo_dist.model.folder import is_adapter, model_folder
from dpo_dist.model.load import load_packed
from dpo_dist.model.lora import adapted_layers, load_adapter
from dpo_dist.model.merge import average_merged, average_saved, gives_two
from dpo_dist.reference.digest import digest_model
from dpo_dist.training.finish import run_card

_COARSE = {"BF16": torch.bfloat16, "F16": torch.float16}
_CPU = torch.device("cpu")
_READ, _SCORED = 16, 4
# Between two orders of the same float32 sums, in nats per token.
_FLOOR = 1e-4
# Of the drift that rounding the same weights causes; sums of rounded weights round once more.
_FACTOR = 4.0


@dataclass(frozen=True)
class Drift:
    """Mean absolute differences of log-probs, in nats per token.

    Attributes:
        written: of the folder from the trained weights.
        rounding: of the trained weights, rounded to the precision of the folder, from themselves.
        base: of the trained weights from the base.
        responses: the number of responses.
    """

    written: float
    rounding: float
    base: float
    responses: int

    def __str__(self) -> str:
        return (
            f"log-probs of {self.responses} responses differ from those of the trained weights by "
            f"{self.written:.2g} nats a token (rounding: {self.rounding:.2g}; the base: {self.base:.2g})"
        )


def check_exported(
    exported: Exported, pairs: Sequence[Sequences], config: RunConfig, say: Callable[[str], None]
) -> None:
    """Score training pairs with the written folder and with the trained weights, in float32 on the CPU.

    Memory is that of one model in float32.

    Args:
        exported: before it has its name.
        pairs: from `read_pairs`.
        config: of the run.
        say: prints the result.

    Raises:
        CheckpointError: log-probs differ by more than rounding explains.
        ConfigError: the base cannot be read.
    """
    found, dtype = _plain_logps(exported, config, pairs), _coarsest_dtype(exported.folder)
    expected, rounded, base = _trained_logps(exported, config, pairs, dtype)
    drift = Drift(
        _mean(found - expected),
        _mean(rounded - expected),
        _mean(expected - base),
        sum(len(pair.responses) for pair in pairs),
    )
    if not drift.written <= _FLOOR + _FACTOR * drift.rounding:  # not ">", which accepts nan
        raise CheckpointError(
            "the written folder computes other log-probs than the trained weights",
            where=str(exported.folder),
            got=str(drift),
            expected=f"at most {_FLOOR + _FACTOR * drift.rounding:.2g}",
            remedy="report it with the run's config.yaml; export.check=false writes the folder all the same",
        )
    say(f"checked: {drift}")
    if drift.rounding > drift.base / 4 and dtype is not torch.float32:
        say("warning: rounding is a large part of what training changed: export.dtype=fp32 keeps it")


def _mean(difference: Tensor) -> float:
    return float(difference.abs().mean())


def read_pairs(config: RunConfig) -> list[Sequences]:
    """Return the shortest of the first pairs of the training data, as training encodes them.

    Raises:
        ConfigError: they, or the weights of the base, which the check loads too, cannot be read.
    """
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
    lengths = [len(pair.prompt_ids) + sum(map(len, pair.responses)) for pair in pairs]
    return [pairs[index] for index in np.argsort(lengths, kind="stable")[:_SCORED]]


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
    model = load_packed(exported.base, _on_cpu(config.model), config.data.max_length, _CPU).eval()
    settle(CheckedModel(model, model, _CPU, config.data.max_length))
    keys = np.zeros((sum(len(pair.responses) for pair in pairs), 2), dtype=np.uint64)
    batch = pack(pairs, keys)
    base = model(batch)
    _use_trained(model, exported)
    expected = model(batch)
    if not is_adapter(exported.folder):  # what is rounded are the sums
        for layer in adapted_layers(model):
            layer.merge()
    for name, weight in model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name or not is_adapter(exported.folder):
            weight.copy_(weight.to(dtype))
    return expected, model(batch), base


def _on_cpu(model: ModelConfig) -> ModelConfig:
    """Return the model in float32 without the options that need a GPU or change only speed and memory."""
    return replace(
        model,
        dtype=Dtype.fp32,
        attention=AttentionBackend.auto,
        quantization=None,
        liger=False,
        compile=False,
        activation_offload=False,
        mlp_tile_tokens=None,
    )


def _use_trained(model: Any, exported: Exported) -> None:
    """Give a loaded base the trained weights, as precise as they are."""
    members = exported.adapters
    if not members:
        for name, weight in model.causal_lm.named_parameters():
            if weight.requires_grad:
                weight.copy_(exported.read(name))
    elif len(members) > 1 and not is_adapter(exported.folder):
        _merge(model.causal_lm, members)
    else:
        # Beside the result, where there is room, and where the next export removes it if this one is killed.
        with temporary_folder(final_name(exported.folder)) as folder:
            (_, only), *others = members
            config, weights = only.config, {name: only.read(name) for name in only.names}
            if others:
                config, weights = stack(members)
                weights |= average_saved(members)
            write_adapter(folder, config, weights)
            load_adapter(model, folder, "export.check")


def _merge(causal_lm: Any, members: Members) -> None:
    """Replace the weights of a base by the average of it with each adapter merged into it."""
    names = {f"{layer}.weight" for _, member in members for layer in member.layers}
    names |= {name for _, member in members for name in member.saved}
    shared = shared_weights(causal_lm)
    if gives_two(members, shared):
        output = causal_lm.get_output_embeddings()
        output.weight = torch.nn.Parameter(output.weight.clone())
    else:
        names -= set(shared[1:])
    for name in sorted(names):
        weight = causal_lm.get_parameter(name)
        weight.copy_(average_merged(name, weight, members))


def export_model(config: RunConfig, sources: Sequence[Path], output: Path, console: Console) -> None:
    """Write `output` from a checkpoint or an average, checked, whole or not at all.

    Raises:
        CheckpointError: a checkpoint is damaged, or `output` cannot be written or computes other log-probs.
        ConfigError: the base model or the pairs of the check cannot be read, or members do not go together.
    """

    def card() -> str:
        text = ""
        with spared("the model card", console.say):
            text = _card(config, sources[0], console)
        return text  # noqa: RET504 (a bug ends the block before)

    _check_base(config, sources)
    console.say(f"reading {', '.join(map(str, sources))}")
    check = None
    if config.export.check:  # pairs that cannot be read are an error before anything is written
        check = partial(check_exported, pairs=read_pairs(config), config=config, say=console.say)
    export_models(sources, output, config, None if config.export.average else card, check, replaces=False)


def _check_base(config: RunConfig, sources: Sequence[Path]) -> None:
    """Check that files that become part of the result are those that training started from.

    They are the base of a merged adapter, and the adapter below a new one. The check of the written folder
    reads the same files, so it would not see the difference.

    Raises:
        ConfigError: they have changed, or cannot be read.
    """
    adapter, own = config.model.adapter, RunFolder.of(config).checkpoints
    if adapter is not None:
        _check_one_start(sources)
    if adapter is None or not (config.export.merge or adapter.on_top):
        return
    recorded = {_model_digest(source) for source in sources if source.parent == own} - {""}
    if not recorded:
        return
    found = digest_model(
        model_folder(config.model.path, config.model.revision),
        Path(config.reference.store),
        remote_code=config.model.trust_remote_code,
        adapter=start_folder(config.model),
    )
    if recorded != {found.digest}:
        raise ConfigError(
            "the model that this run started from has changed since",
            where="model.path" if adapter.path is None else "model.path, model.adapter.path",
            got=f"digest {found.digest}",
            expected=f"digest {', '.join(sorted(recorded))}",
            remedy="restore its files"
            + ("" if adapter.on_top else ", or set export.merge=false to write the adapter by itself"),
        )


def _check_one_start(sources: Sequence[Path]) -> None:
    """Check that the checkpoints of adapters started from the same model, as far as they record it.

    Raises:
        ConfigError: they did not.
    """
    starts = {source: digest for source in sources if (digest := _model_digest(source))}
    if len(set(starts.values())) > 1:
        raise ConfigError(
            "the members of the average are adapters of different models",
            where="export.average",
            got=", ".join(f"{source} of {digest[:12]}" for source, digest in starts.items()),
            expected="checkpoints of runs that started from the same model",
            remedy="name checkpoints of one start; an adapter only means something on its own base",
        )


def _model_digest(checkpoint: Path) -> str:
    """Return the digest of the model that training started from; "" if the checkpoint has none."""
    try:
        return str(read_state(checkpoint).get("model") or "")
    except (OSError, ValueError):  # a damaged checkpoint, of which the export says more
        return ""


def _card(config: RunConfig, checkpoint: Path, console: Console) -> str:
    """Return the model card of a checkpoint; "" if its run has not recorded its data."""
    folder, step = RunFolder.of(config), step_of(checkpoint.name)
    try:
        state = read_state(checkpoint)
    except (OSError, ValueError) as error:  # its run has removed it meanwhile
        raise damaged_checkpoint(checkpoint, [first_line(error)]) from error
    counts = state.get("counts") or _read(folder.summary).get("data")
    if counts is None:  # of an earlier version, before the end of its run
        console.say("warning: no model card: this run has no counts of its data yet")
        return ""
    is_end = step == state["steps"]
    summary = {
        "exit": (RunOutcome.completed if is_end else RunOutcome.preempted).value,
        "steps": step,
        "pairs_seen": state["pairs_seen"],
        "reference": state.get("reference_report", {}),
        "settings": settings(config),
        "data": counts,
    }
    rows = [row for row in read_latest_rows(folder) if row["step"] <= state["step"]]
    versions = _read(folder.environment).get("packages") or package_versions()
    is_evaluated = is_end and config.export.weights is ExportedWeights.last
    written = replace(config, model=replace(config.model, adapter=None)) if config.export.merge else config
    return run_card(written, rows, summary, console, is_evaluated=is_evaluated, versions=versions)


def _read(file: Path) -> Mapping[str, Any]:
    """Return the object in a file of the run; empty if it cannot be read."""
    try:
        content: Any = json.loads(read_small(file))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
