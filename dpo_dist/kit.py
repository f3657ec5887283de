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
    from dpo_dist.config.command_line import run_verb
    from dpo_dist.config.extensions import Extension, Verb
    from dpo_dist.config.identity import kinds_in
    from dpo_dist.config.keys import run_keys
    from dpo_dist.config.load import complete_config, load_run_config, to_yaml
    from dpo_dist.config.losses import LossConfig, LossKind, loss_unit
    from dpo_dist.config.metrics import (
        ACCURACIES,
        ALL,
        AUC,
        LOSS_METRICS,
        MAIN,
        METRICS,
        PREFIX,
        find_metric,
        results_name,
    )
    from dpo_dist.config.rules import Rule, check_rules, needs_of, to_unset, unused
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
    from dpo_dist.encoded.dataset import PreferenceDataset
    from dpo_dist.model.files.load import TORCH_DTYPES
    from dpo_dist.model.flops import REACHED_SHARES, matmul_peak
    from dpo_dist.model.packed import PackedCausalLM, packed_logps
    from dpo_dist.objective.intervals import Column, bootstrap_intervals, wilson_interval
    from dpo_dist.training.evaluation.results import write_evaluation
    from dpo_dist.training.evaluation.table import EVALUATION_METRICS, evaluation_cells
    from dpo_dist.training.evaluation.trained_prompts import count_trained
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
    from dpo_dist.training.start.footprint import GPUS_PER_NODE, Footprint, Shapes, policy_without_weights
    from dpo_dist.training.start.named_models import locate_model, short_name
    from dpo_dist.training.start.open_run import DEFAULT_TOKENS, Run
    from dpo_dist.training.start.preflight import check_start, checked_console

__all__ = [
    "ACCURACIES",
    "ALL",
    "AUC",
    "DEFAULT_TOKENS",
    "EVALUATION_METRICS",
    "GPUS_PER_NODE",
    "LAST_EVALUATION",
    "LOSS_METRICS",
    "MAIN",
    "METRICS",
    "PREFIX",
    "REACHED_SHARES",
    "TORCH_DTYPES",
    "UNSET",
    "ZERO_STAGES",
    "Column",
    "Direction",
    "Dtype",
    "Extension",
    "Footprint",
    "LossConfig",
    "LossKind",
    "MetricsLog",
    "MetricsRow",
    "ModelConfig",
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
    "bootstrap_intervals",
    "check_rules",
    "check_start",
    "check_writable",
    "checked_console",
    "complete_config",
    "count_trained",
    "evaluation_cells",
    "existing_run",
    "final_and_best",
    "find_metric",
    "finite",
    "is_checkpoint",
    "is_collapsed",
    "kinds_in",
    "load_run_config",
    "locate_model",
    "logps_by_side",
    "loss_unit",
    "matmul_peak",
    "metrics_by_source",
    "needs_of",
    "packed_logps",
    "policy_without_weights",
    "results_name",
    "run_keys",
    "run_verb",
    "short_name",
    "strip_key",
    "to_unset",
    "to_yaml",
    "train",
    "unused",
    "wilson_interval",
    "write_evaluation",
]

_NAMES = {
    "config.command_line": ("run_verb",),
    "config.extensions": ("Extension", "Verb"),
    "config.identity": ("kinds_in",),
    "config.keys": ("run_keys",),
    "config.load": ("complete_config", "load_run_config", "to_yaml"),
    "config.losses": ("LossConfig", "LossKind", "loss_unit"),
    "config.metrics": (
        "ACCURACIES",
        "ALL",
        "AUC",
        "LOSS_METRICS",
        "MAIN",
        "METRICS",
        "PREFIX",
        "find_metric",
        "results_name",
    ),
    "config.rules": ("Rule", "check_rules", "needs_of", "to_unset", "unused"),
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
    "encoded.dataset": ("PreferenceDataset",),
    "model.files.load": ("TORCH_DTYPES",),
    "model.flops": ("REACHED_SHARES", "matmul_peak"),
    "model.packed": ("PackedCausalLM", "packed_logps"),
    "objective.intervals": ("Column", "bootstrap_intervals", "wilson_interval"),
    "training.evaluation.results": ("write_evaluation",),
    "training.evaluation.table": ("EVALUATION_METRICS", "evaluation_cells"),
    "training.evaluation.trained_prompts": ("count_trained",),
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
    "training.start.footprint": ("GPUS_PER_NODE", "Footprint", "Shapes", "policy_without_weights"),
    "training.start.named_models": ("locate_model", "short_name"),
    "training.start.open_run": ("DEFAULT_TOKENS", "Run"),
    "training.start.preflight": ("check_start", "checked_console"),
}
"""The same names by the module that has them; a test compares them with the imports above."""
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import the module of a name when it is asked for: some import torch, which takes seconds."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"dpo_dist.{_MODULE_OF[name]}"), name)
