"""Write a checkpoint as a model folder: at the end of a run, and by `export`."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dpo_dist.config.identity import settings
from dpo_dist.config.load import saved_config
from dpo_dist.config.run_folder import RunFolder, checkpoint_step, existing_run, is_checkpoint
from dpo_dist.config.schema import ExportedWeights, ModelConfig, RunConfig
from dpo_dist.data import ChatTemplate, DataConfig, trained_stops
from dpo_dist.distributed.checkpoint.saver import (
    MANIFEST,
    checkpoint_state,
    damaged_checkpoint,
    find_faults,
    read_weights,
)
from dpo_dist.distributed.checkpoint.slices import EMA, WEIGHT
from dpo_dist.distributed.deepspeed_config import unsharded_loading
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import CheckpointError, ConfigError, RunOutcome
from dpo_dist.foundation.files import (
    content_digest,
    final_name,
    read_fields,
    remove_abandoned,
    staged_folder,
    temporary_folder,
)
from dpo_dist.model.architectures import auto_class
from dpo_dist.model.files.folder import (
    ADAPTER_WEIGHTS,
    description_folder,
    is_adapter,
    model_folder,
    start_folder,
    tokenizer_folder,
)
from dpo_dist.model.files.load import (
    TORCH_DTYPES,
    check_contents_at_hand,
    load_config,
    load_tokenizer,
    without_weights,
)
from dpo_dist.model.files.manifest import write_manifest
from dpo_dist.model.files.save import (
    copy_tokenizer,
    ignored_tensors,
    save_tokenizer,
    write_adapter,
    write_merged,
    write_weights,
    writing_errors,
)
from dpo_dist.model.files.stops import padding_token, set_padding, write_stops
from dpo_dist.model.files.stored import plain_config, plain_weights
from dpo_dist.model.layers import other_weights
from dpo_dist.model.library_internals import ignored_patterns
from dpo_dist.reference.digest import description_digest, digest_model
from dpo_dist.reference.model_source import find_model
from dpo_dist.training.reporting.metrics_log import read_rows
from dpo_dist.training.start.open_run import Run

_PARTS = {ExportedWeights.last: WEIGHT, ExportedWeights.ema: EMA}


def export_checkpoint(
    checkpoint: Path,
    folder: Path,
    config: RunConfig,
    card: Callable[[str], str] | None = None,
    *,
    is_new: bool = False,
    replaces: bool = True,
) -> None:
    """Write a checkpoint of any world as the folder of a whole model or an adapter; all of it or nothing.

    Needs no GPU and no other process. Needs the base's weights only if an adapter is merged or the
    architecture has tensors that are not trained. The model is in host memory once, a merged one in float32.

    Args:
        config: the run's configuration.
        card: returns README.md for the name of the model's auto class; "" writes no file.
        is_new: whether this process has just written the checkpoint; then no file is checked.
        replaces: whether a folder of this name is replaced, also if another process has just made it.
    """
    state = checkpoint_state(checkpoint)
    _check_description(config, state)
    base = description_folder(config.model.path, config.model.revision, needs_weights=False)
    start = start_folder(config.model)
    code = config.model.trust_remote_code
    model_config = load_config(base, config.model)
    is_whole = config.model.adapter is None
    causal_lm = without_weights(model_config, config.model, start, keeps_others=is_whole)
    if not is_new:
        check_contents_at_hand(base, config.model)
        faults = find_faults(checkpoint, 0, 1)
        if faults:
            raise damaged_checkpoint(checkpoint, faults)
    trained = {name: weight for name, weight in causal_lm.named_parameters() if weight.requires_grad}
    saved = read_weights(checkpoint, trained)
    part = _PARTS[config.export.weights]
    if part not in saved.parts:
        raise ConfigError(
            "only checkpoints of runs with trainer.ema_decay have a moving average of the weights",
            where="export.weights",
            got=f"ema, {checkpoint}",
            remedy="name such a checkpoint, or set export.weights=last",
        )
    copies_weights = is_whole and bool(_untrained_names(causal_lm) or ignored_patterns(causal_lm))
    if config.export.merge or copies_weights:
        _check_base_weights(config, state)
    dtype = TORCH_DTYPES[config.model.dtype]

    def read(name: str) -> Tensor:
        return saved.whole_in(dtype, name, part) if is_whole else saved.whole(name, part)

    with writing_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder.parent)  # what killed exports left would fill the disk
    with writing_errors(folder), staged_folder(folder, replaces=replaces) as temporary:
        # First, while no other weights are in memory: this reads the whole base.
        weights = _untrained_tensors(causal_lm, config.model, dtype) if is_whole else {}
        weights |= {name: read(name) for name in saved.shapes}
        files = tokenizer_folder(base, start)
        tokenizer = load_tokenizer(files, config.model)
        padding = None
        if config.model.gives_scores:
            tokenizer.pad_token = padding_token(tokenizer, config.data)
            padding = tokenizer.pad_token_id
            set_padding(causal_lm.config, padding)
        if is_whole:
            write_weights(temporary, causal_lm, weights, base)
        elif config.export.merge:
            model_files = model_folder(config.model.path, config.model.revision)
            with temporary_folder(final_name(temporary)) as adapter:  # `remove_abandoned` knows this name
                write_adapter(adapter, causal_lm, weights, torch.float32)
                write_merged(temporary, model_files, adapter, dtype, trust_remote_code=code, padding=padding)
        else:
            write_adapter(temporary, causal_lm, weights, dtype)
        _write_tokenizer(temporary, base, files, tokenizer, config)
        text = "" if card is None else card(auto_class(model_config, code).__name__)
        if text:
            (temporary / "README.md").write_text(text, encoding="utf-8")
        write_manifest(temporary, state["base"])
        # Load the folder as users do: weights are finite, and those of a whole model equal the trained ones.
        if not is_new:
            if is_adapter(temporary):
                weights_there = load_file(temporary / ADAPTER_WEIGHTS)
            else:
                weights_there = dict(_load_model(temporary, trusts_code=code).named_parameters())
            if is_whole:
                wrong = [name for name in saved.shapes if not torch.equal(weights_there[name], read(name))]
            else:
                wrong = [name for name, weight in weights_there.items() if not weight.isfinite().all()]
            if wrong:
                raise CheckpointError(
                    "weights of the written folder differ from the trained ones, or are not finite",
                    where=str(temporary),
                    got=f"{len(wrong)} of {len(weights_there)} weights: {wrong[0]}",
                    remedy="report this error with the run's config.yaml",
                )


def _write_tokenizer(folder: Path, base: Path, files: Path, tokenizer: Any, config: RunConfig) -> None:
    """Write the tokenizer of `files` with the chat template and padding of a run, and where texts end."""
    template = config.data.chat_template
    is_own = template is None and tokenizer.pad_token == load_tokenizer(files, config.model).pad_token
    if not is_own:
        save_tokenizer(ChatTemplate(tokenizer, template).alone(), folder)
    else:
        copy_tokenizer(files, folder)
    if not config.model.gives_scores:
        write_stops(folder, base, trained_stops(tokenizer, config.data))


def checkpoint_as_model(
    checkpoint: Path, below: Path, say: Callable[[str], None], trusts_code: bool = False
) -> Path:
    """Return a model folder below `below` with a checkpoint's weights; it is written only once."""
    checkpoint = checkpoint.resolve()
    trained = checkpoint.parents[1]
    digest = content_digest([checkpoint / MANIFEST])[:16]
    target = below / f"{trained.name}-{checkpoint.name}-{digest}"
    if not target.is_dir():
        say(f"writing the weights of {checkpoint} as a model folder")
        config = saved_config(existing_run(trained).config)
        # Not that run's own setting: its configuration could run code that the caller does not trust.
        export_checkpoint(
            checkpoint, target, replace(config, model=replace(config.model, trust_remote_code=trusts_code))
        )
    return target


def whole_model(path: str, below: Path, run: Run) -> str:
    """Return a model's folder or hub name; a checkpoint is first written to one `below`. Collective."""
    if not is_checkpoint(Path(path)):
        return path
    trusts_code = run.config.model.trust_remote_code
    write = partial(checkpoint_as_model, Path(path), below, run.console.say, trusts_code)
    with run.console.heartbeat(f"writing the weights of {path}"), unsharded_loading(run.world):
        return str(run.world.on_main(write))


def _untrained_names(causal_lm: Any) -> set[str]:
    """Return the names of the base's stored buffers, and of its weights that are not trained."""
    frozen = {name for name, weight in causal_lm.named_parameters() if not weight.requires_grad}
    buffers = {name for name, _ in causal_lm.named_buffers()}
    return frozen | (buffers & set(causal_lm.state_dict()))


def _untrained_tensors(causal_lm: Any, model: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the base's tensors of `_untrained_names`, and its ignored tensors.

    Weights that text does not use are cast to `dtype`; others keep their dtype, because routers compute in
    float32.
    """
    names = _untrained_names(causal_lm)
    if not names and not ignored_patterns(causal_lm):
        return {}
    others = other_weights(causal_lm)
    unused = {name for name, weight in causal_lm.named_parameters() if weight in others}
    folder = model_folder(model.path, model.revision)
    loaded = _load_model(folder, trusts_code=model.trust_remote_code).state_dict() if names else {}
    tensors = {name: loaded[name].to(dtype) if name in unused else loaded[name] for name in names}
    return tensors | ignored_tensors(causal_lm, folder, dtype)


def _load_model(folder: Path, *, trusts_code: bool) -> Any:
    described = plain_config(folder, trust_remote_code=trusts_code)
    with plain_weights(folder, described.dtype or torch.float32):
        return auto_class(described, trusts_code).from_pretrained(
            folder, config=described, dtype="auto", use_safetensors=True, trust_remote_code=trusts_code
        )


def _check_description(config: RunConfig, recorded: Mapping[str, Any]) -> None:
    """Check that the files from which a run started, but the base's weights, have not changed since."""
    model = config.model
    base = description_folder(model.path, model.revision, needs_weights=False)
    current = description_digest(model, base, start_folder(model))
    if current != recorded["description"]:
        what = "tokenizer, chat template, config.json, generation_config.json, processor or adapter"
        raise _changed(config, f"{what} of the model", current, recorded["description"])


def _check_base_weights(config: RunConfig, recorded: Mapping[str, Any]) -> None:
    """Check that the base's weights, which become a part of the result, have not changed since the start."""
    folder = model_folder(config.model.path, config.model.revision)
    current = digest_model(folder, Path(config.reference.store)).base
    if current != recorded["base"]:
        raise _changed(config, "model", current, recorded["base"])


def _changed(config: RunConfig, what: str, current: str, recorded: str) -> ConfigError:
    adapter = config.model.adapter
    continues = adapter is not None and adapter.path is not None
    return ConfigError(
        f"the {what} that this run started from has changed",
        where="model.path, model.adapter.path" if continues else "model.path",
        got=f"digest {current}",
        expected=f"digest {recorded}",
        remedy="restore its files",
    )


def export_model(
    config: RunConfig, checkpoint: Path, output: Path, console: Console, run_card: Callable[..., str]
) -> None:
    """Check a checkpoint and write it to `output`, all of it or nothing, with the card of `run_card`."""
    console.say(f"reading {checkpoint}")
    state = checkpoint_state(checkpoint)
    versions = read_fields(RunFolder(config.run.path).environment)["packages"]

    def card(loader: str) -> str:
        folder = RunFolder(config.run.path)
        step = checkpoint_step(checkpoint.name)
        is_end = step == state["steps"]
        summary = {
            "exit": (RunOutcome.completed if is_end else RunOutcome.preempted).value,
            "steps": step,
            "pairs_seen": state["pairs_seen"],
            "reference": state["reference_report"],
            "settings": settings(config),
            "data": state["counts"],
        }
        rows = read_rows(folder, state["step"])
        is_evaluated = is_end and config.export.weights is ExportedWeights.last
        merged = replace(config, model=replace(config.model, adapter=None)) if config.export.merge else config
        return run_card(merged, rows, summary, console.warn, versions, loader, is_evaluated=is_evaluated)

    export_checkpoint(checkpoint, output, config, card, replaces=False)


def merge_adapter(adapter: Path, folder: Path, model: ModelConfig, data: DataConfig, store: Path) -> None:
    """Write an adapter's base with the adapter merged into its weights, in `model.dtype`.

    The base is merged without quantization. The folder is written whole or not at all. `store` caches the
    digests of weight files.
    """
    remove_abandoned(folder.parent)  # a start that was killed may have left a whole model
    source = find_model(str(adapter), model, store, "model.adapter")
    dtype = TORCH_DTYPES[model.dtype]
    code = model.trust_remote_code
    with writing_errors(folder), staged_folder(folder) as temporary:
        write_merged(temporary, source.folder, adapter, dtype, trust_remote_code=code)
        copy_tokenizer(source.tokenizer_folder, temporary)
        stops = trained_stops(load_tokenizer(temporary, model), data)
        write_stops(temporary, source.folder, stops)
        write_manifest(temporary, None)
