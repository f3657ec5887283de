"""What tools take from the trainer: a module below `tools/` and `compat/` imports nothing else of it.

Beside this kit a tool takes from `dpo_dist.data` (records, templates, token ids) and `dpo_dist.foundation`.

- **A verb**: `extension.py` in a tool's folder has an `Extension`, with `Verb`s, keys and `Rule`s; `unused`
  and `to_unset` make rules and remedies, `needs_of` and `check_rules` check them. `run_verb` runs a verb with
  its configuration; `checked_console` checks packages and the place, `check_start` also files and models.
- **Configuration**: `RunConfig` with `ModelConfig`, `LossConfig`, and the values `Dtype`, `Direction`,
  `LossKind`, `ReferenceMode`, `UNSET`. `load_run_config` reads words, `saved_config` a run's file, `to_yaml`
  writes one; `run_keys` has all keys.
- **Folders**: `RunFolder` has the files of a run, and a tool adds its own as `PathBelow`; `check_writable`
  checks one, `is_checkpoint` knows a checkpoint. `locate_model` finds what a user calls a model, `short_name`
  names it.
- **Metrics**: `METRICS` has their titles and forms (`find_metric`), among them `MAIN`, `ACCURACIES`, `AUC`
  and `LOSS_METRICS`; names of evaluations begin with `PREFIX`, `ALL` and `results_name` name their parts. A
  `MetricsRow` has the values of a step or evaluation; `finite` reads one.
- **Evaluations**: `write_evaluation` writes one, `evaluation_cells` are its table of `EVALUATION_METRICS`,
  `count_trained` counts prompts that a model knows from its training. `bootstrap_intervals` and
  `wilson_interval` are intervals of means and shares, of values in a `Column`.
- **A run**: `train` trains; a `Run` has its configuration, processes and console.
- **Models and data**: `PackedCausalLM` scores examples by `packed_logps`; a `PreferenceDataset` has them.

Each name is imported when it is asked for: a tool that reads files imports no torch.
"""

from importlib import import_module  # noqa: TID251  (no code of the user)
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_dist.config.command_line import run_verb, write_command
    from dpo_dist.config.compose import FAILURES, parse_overrides
    from dpo_dist.config.extensions import Extension, Verb
    from dpo_dist.config.identity import kinds_in
    from dpo_dist.config.keys import run_keys
    from dpo_dist.config.load import complete_config, load_run_config, to_yaml
    from dpo_dist.config.losses import LossConfig, LossKind, balancing_weight, kinds_using, loss_unit
    from dpo_dist.config.metrics import (
        ACCURACIES,
        ALL,
        AUC,
        CUSTOM,
        LOSS_METRICS,
        MAIN,
        METRICS,
        PREFIX,
        TERMS,
        find_metric,
        results_name,
    )
    from dpo_dist.config.mistakes import fits
    from dpo_dist.config.rules import Rule, best_direction, check_rules, needs_of, to_unset, unused, value_at
    from dpo_dist.config.run_folder import (
        LAST_EVALUATION,
        PathBelow,
        RunFolder,
        check_writable,
        existing_run,
        is_checkpoint,
        strip_key,
    )
    from dpo_dist.config.schema import (
        UNSET,
        ZERO_STAGES,
        Direction,
        Dtype,
        ModelConfig,
        Offload,
        ParallelismKind,
        ReferenceMode,
        RunConfig,
        TrainerConfig,
    )
    from dpo_dist.distributed.deepspeed_config import unsharded_loading
    from dpo_dist.distributed.memory import return_memory
    from dpo_dist.distributed.zero import Engine
    from dpo_dist.encoded.dataset import PreferenceDataset
    from dpo_dist.encoded.workers import in_chunks
    from dpo_dist.model.architectures import context_length
    from dpo_dist.model.files.folder import description_folder, hub_commit, local_model_folder
    from dpo_dist.model.files.load import TORCH_DTYPES, load_config, load_encoder
    from dpo_dist.model.files.stops import find_stop_ids
    from dpo_dist.model.flops import REACHED_SHARES, matmul_peak
    from dpo_dist.model.generation import (
        NotFiniteError,
        WrongGenerationError,
        can_mix_lengths,
        extend,
        image_inputs,
    )
    from dpo_dist.model.packed import PackedCausalLM, packed_logps
    from dpo_dist.objective.intervals import Column, bootstrap_intervals, wilson_interval
    from dpo_dist.reference.digest import digest_model
    from dpo_dist.reference.model_source import ModelSource, find_files, find_model
    from dpo_dist.training.evaluation.results import write_evaluation
    from dpo_dist.training.evaluation.table import EVALUATION_METRICS, evaluation_cells
    from dpo_dist.training.evaluation.trained_prompts import count_trained
    from dpo_dist.training.export import checkpoint_as_model, merge_adapter
    from dpo_dist.training.reporting.history import RunHistory
    from dpo_dist.training.reporting.metrics_log import (
        MetricsLog,
        MetricsRow,
        final_and_best,
        finite,
        is_collapsed,
        logps_by_side,
        metrics_by_source,
    )
    from dpo_dist.training.run import train
    from dpo_dist.training.start.dry_run import dry_run
    from dpo_dist.training.start.footprint import GPUS_PER_NODE, Footprint, Shapes, policy_without_weights
    from dpo_dist.training.start.named_models import locate_model, short_name
    from dpo_dist.training.start.open_run import DEFAULT_TOKENS, Run, joined_run
    from dpo_dist.training.start.preflight import check_start, checked_console

__all__ = [
    "ACCURACIES",
    "ALL",
    "AUC",
    "CUSTOM",
    "DEFAULT_TOKENS",
    "EVALUATION_METRICS",
    "FAILURES",
    "GPUS_PER_NODE",
    "LAST_EVALUATION",
    "LOSS_METRICS",
    "MAIN",
    "METRICS",
    "PREFIX",
    "REACHED_SHARES",
    "TERMS",
    "TORCH_DTYPES",
    "UNSET",
    "ZERO_STAGES",
    "Column",
    "Direction",
    "Dtype",
    "Engine",
    "Extension",
    "Footprint",
    "LossConfig",
    "LossKind",
    "MetricsLog",
    "MetricsRow",
    "ModelConfig",
    "ModelSource",
    "NotFiniteError",
    "Offload",
    "PackedCausalLM",
    "ParallelismKind",
    "PathBelow",
    "PreferenceDataset",
    "ReferenceMode",
    "Rule",
    "Run",
    "RunConfig",
    "RunFolder",
    "RunHistory",
    "Shapes",
    "TrainerConfig",
    "Verb",
    "WrongGenerationError",
    "balancing_weight",
    "best_direction",
    "bootstrap_intervals",
    "can_mix_lengths",
    "check_rules",
    "check_start",
    "check_writable",
    "checked_console",
    "checkpoint_as_model",
    "complete_config",
    "context_length",
    "count_trained",
    "description_folder",
    "digest_model",
    "dry_run",
    "evaluation_cells",
    "existing_run",
    "extend",
    "final_and_best",
    "find_files",
    "find_metric",
    "find_model",
    "find_stop_ids",
    "finite",
    "fits",
    "hub_commit",
    "image_inputs",
    "in_chunks",
    "is_checkpoint",
    "is_collapsed",
    "joined_run",
    "kinds_in",
    "kinds_using",
    "load_config",
    "load_encoder",
    "load_run_config",
    "local_model_folder",
    "locate_model",
    "logps_by_side",
    "loss_unit",
    "matmul_peak",
    "merge_adapter",
    "metrics_by_source",
    "needs_of",
    "packed_logps",
    "parse_overrides",
    "policy_without_weights",
    "results_name",
    "return_memory",
    "run_keys",
    "run_verb",
    "short_name",
    "strip_key",
    "to_unset",
    "to_yaml",
    "train",
    "unsharded_loading",
    "unused",
    "value_at",
    "wilson_interval",
    "write_command",
    "write_evaluation",
]

_NAMES = {
    "config.command_line": ("run_verb", "write_command"),
    "config.compose": ("FAILURES", "parse_overrides"),
    "config.extensions": ("Extension", "Verb"),
    "config.identity": ("kinds_in",),
    "config.keys": ("run_keys",),
    "config.load": ("complete_config", "load_run_config", "to_yaml"),
    "config.losses": ("LossConfig", "LossKind", "balancing_weight", "kinds_using", "loss_unit"),
    "config.metrics": (
        "ACCURACIES",
        "ALL",
        "AUC",
        "CUSTOM",
        "LOSS_METRICS",
        "MAIN",
        "METRICS",
        "PREFIX",
        "TERMS",
        "find_metric",
        "results_name",
    ),
    "config.mistakes": ("fits",),
    "config.rules": ("Rule", "best_direction", "check_rules", "needs_of", "to_unset", "unused", "value_at"),
    "config.run_folder": (
        "LAST_EVALUATION",
        "PathBelow",
        "RunFolder",
        "check_writable",
        "existing_run",
        "is_checkpoint",
        "strip_key",
    ),
    "config.schema": (
        "UNSET",
        "ZERO_STAGES",
        "Direction",
        "Dtype",
        "ModelConfig",
        "Offload",
        "ParallelismKind",
        "ReferenceMode",
        "RunConfig",
        "TrainerConfig",
    ),
    "distributed.deepspeed_config": ("unsharded_loading",),
    "distributed.memory": ("return_memory",),
    "distributed.zero": ("Engine",),
    "encoded.dataset": ("PreferenceDataset",),
    "encoded.workers": ("in_chunks",),
    "model.architectures": ("context_length",),
    "model.files.folder": ("description_folder", "hub_commit", "local_model_folder"),
    "model.files.load": ("TORCH_DTYPES", "load_config", "load_encoder"),
    "model.files.stops": ("find_stop_ids",),
    "model.flops": ("REACHED_SHARES", "matmul_peak"),
    "model.generation": (
        "NotFiniteError",
        "WrongGenerationError",
        "can_mix_lengths",
        "extend",
        "image_inputs",
    ),
    "model.packed": ("PackedCausalLM", "packed_logps"),
    "objective.intervals": ("Column", "bootstrap_intervals", "wilson_interval"),
    "reference.digest": ("digest_model",),
    "reference.model_source": ("ModelSource", "find_files", "find_model"),
    "training.evaluation.results": ("write_evaluation",),
    "training.evaluation.table": ("EVALUATION_METRICS", "evaluation_cells"),
    "training.evaluation.trained_prompts": ("count_trained",),
    "training.export": ("checkpoint_as_model", "merge_adapter"),
    "training.reporting.history": ("RunHistory",),
    "training.reporting.metrics_log": (
        "MetricsLog",
        "MetricsRow",
        "final_and_best",
        "finite",
        "is_collapsed",
        "logps_by_side",
        "metrics_by_source",
    ),
    "training.run": ("train",),
    "training.start.dry_run": ("dry_run",),
    "training.start.footprint": ("GPUS_PER_NODE", "Footprint", "Shapes", "policy_without_weights"),
    "training.start.named_models": ("locate_model", "short_name"),
    "training.start.open_run": ("DEFAULT_TOKENS", "Run", "joined_run"),
    "training.start.preflight": ("check_start", "checked_console"),
}
"""The same names by the module that has them; a test compares them with the imports above."""
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import the module of a name when it is asked for: some import torch, which takes seconds."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"dpo_dist.{_MODULE_OF[name]}"), name)
