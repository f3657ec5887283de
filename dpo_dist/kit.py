"""What tools take from the trainer: a module below `tools/` and `compat/` imports from here.

Beside this kit a tool takes from `dpo_dist.data` (records, templates, token ids) and `dpo_dist.foundation`.

- **A verb**: `extension.py` in a tool's folder has an `Extension`, with `Verb`s (`VERBS` has all), keys and
  `Rule`s; `unused`, `unused_beside`, `without_evaluations`, `LOSS` and `to_unset` make rules and remedies,
  `needs_of` and `check_rules` check them. `run_verb` runs a verb with its configuration, `check_start` checks
  what it needs, `dry_run` answers `--check`, `start_in_words` says what a start does. `write_command` writes
  the command of another verb.
- **Configuration**: `RunConfig` with `ModelConfig`, `LossConfig`, and the values `Dtype`, `Direction`,
  `LossKind`, `Offload`, `ParallelismKind`, `ReferenceMode`, `UNSET`. `load_run_config` reads words, of which
  `parse_overrides` knows the grammar (`FAILURES` are its errors); `complete_config` checks a changed one,
  `to_yaml` writes one, `saved_config` is that of a run, and `changed_keys` are those that differ from it.
  `run_keys` has all keys, `verb_keys` those of a verb, without indices by `strip_indices`; `fits` says
  whether a key takes a value, `value_at` has it. `read_keys` reads a file, whose mistakes are `explained`.
  `ImagesConfig` is a section of the model's.
- **Losses**: `KINDS` has them, `loss_kinds` names those of a run's settings, `kinds_using` those with an
  option, `loss_unit` says what they count.
- **Folders**: `RunFolder` has the files of a run, and a tool adds its own as `PathBelow`; `check_writable`
  checks one, `existing_run` and `strip_key` read its name on a command line. `is_checkpoint` knows a
  checkpoint, `checkpoint_step` its step, `checkpoint_as_model` exports it, `whole_model` on all ranks.
  `locate_model` finds what a user calls a model, `short_name` names it.
- **Metrics**: `METRICS` has their titles and forms (`find_metric`), among them `MAIN`, `ACCURACIES`, `AUC`,
  `AGREEMENT`, `CUSTOM`, `TERMS`, `EXCESS` and `LOSS_METRICS`. Names of evaluations (`is_evaluation`) begin
  with `PREFIX`; `ALL` names all their pairs.
- **A run on disk**: `RunHistory` has what it wrote, with a `MetricsRow` for each step and evaluation.
  `finite` reads a row, `is_collapsed` judges it, `final_and_best` sums rows up.
- **Evaluations**: `evaluation_cells` are the table of `EVALUATION_METRICS` of one, `count_trained` counts
  prompts that a model knows from its training. `bootstrap_intervals` and `wilson_interval` are intervals of
  means and shares, of values in a `Column`.
- **A run at work**: a `Run` has its configuration, processes and console, and `joined_run` is one in which
  each process loads whole models; `unsharded_loading`, `return_memory`, `explain_out_of_memory` and
  `on_every_rank` are for these. `Stops` raise `Interrupted`. A training has `Inputs` and `PairValues`, and
  what reports on it is a `Reporting`.
- **A model's files**: a `ModelSource` is checked, loaded to generate (`load`) and to score (`load_packed`);
  `find_files` finds one, `find_model` also names it by a digest. `description_folder`, `model_folder` and
  `local_model_folder` find folders, `check_tokenizer_files` checks them,
  `digest_model` says which version they have. `load_config`, `load_tokenizer` (`tokenizer_digest`) and
  `load_encoder` read what is not weights, `load_weights` the rest, `load_reference` an engine of it;
  `context_length` and `find_stop_ids` say where texts end. `TORCH_DTYPES` are the dtypes of weights,
  `has_products` says whether a CPU computes in one. `merge_adapter` writes a merged model.
- **Scores and generation**: `packed_logps` scores examples; an `Engine` has the policy of a run.
  `can_mix_lengths` checks that a model generates what it predicts (`fault_agreement` on every rank), within
  its `rope_limit`; `extend` generates, with images by `image_inputs`; faults are `NotFiniteError` and
  `WrongGenerationError`.
- **Data**: `prepare_data` encodes those of a run, each source as a `PreferenceDataset`; `saved_by_tree` says
  what its shared prefixes save, `PromptImages` are its images. `in_chunks` divides records, `in_order` works
  on chunks in processes, `no_progress` shows nothing.
- **Shapes**: `Shapes` says bytes and FLOPs of a run from `policy_without_weights` and
  `teacher_without_weights`, its `Footprint` those of a device. `matmul_peak`, `REACHED_SHARES`,
  `GPUS_PER_NODE` and `DEFAULT_TOKENS` are for estimates; `check_groups` and `check_shapes` refuse what a
  start refuses.

Each name is imported when it is asked for: a tool that reads files imports no torch.
"""

from typing import TYPE_CHECKING

from dpo_dist.foundation.lazy import lazy_names

if TYPE_CHECKING:
    from dpo_dist.config.command_line import run_verb, write_command
    from dpo_dist.config.compose import parse_overrides, read_keys
    from dpo_dist.config.extensions import Extension, Verb
    from dpo_dist.config.identity import loss_kinds
    from dpo_dist.config.keys import run_keys, strip_indices, to_unset, verb_keys
    from dpo_dist.config.load import changed_keys, complete_config, load_run_config, saved_config, to_yaml
    from dpo_dist.config.losses import KINDS, LossConfig, LossKind, kinds_using, loss_unit
    from dpo_dist.config.metrics import (
        ACCURACIES,
        AGREEMENT,
        ALL,
        AUC,
        CUSTOM,
        EXCESS,
        LOSS_METRICS,
        MAIN,
        METRICS,
        PREFIX,
        TERMS,
        find_metric,
        is_evaluation,
    )
    from dpo_dist.config.mistakes import FAILURES, explained, fits
    from dpo_dist.config.rules import (
        LOSS,
        Rule,
        check_rules,
        needs_of,
        unused,
        unused_beside,
        value_at,
        without_evaluations,
    )
    from dpo_dist.config.run_folder import (
        PathBelow,
        RunFolder,
        check_writable,
        checkpoint_step,
        existing_run,
        is_checkpoint,
        strip_key,
    )
    from dpo_dist.config.schema import (
        UNSET,
        Direction,
        Dtype,
        ImagesConfig,
        ModelConfig,
        Offload,
        ParallelismKind,
        ReferenceMode,
        RunConfig,
    )
    from dpo_dist.config.verbs import VERBS
    from dpo_dist.distributed.deepspeed_config import unsharded_loading
    from dpo_dist.distributed.memory import explain_out_of_memory, return_memory
    from dpo_dist.distributed.processes.world import Interrupted, Stops
    from dpo_dist.distributed.zero import Engine
    from dpo_dist.encoded.build import no_progress
    from dpo_dist.encoded.dataset import PreferenceDataset, PromptImages
    from dpo_dist.encoded.workers import in_chunks, in_order
    from dpo_dist.model.architectures import context_length
    from dpo_dist.model.files.folder import (
        check_tokenizer_files,
        description_folder,
        local_model_folder,
        model_folder,
    )
    from dpo_dist.model.files.load import (
        TORCH_DTYPES,
        load_config,
        load_encoder,
        load_tokenizer,
        load_weights,
        tokenizer_digest,
    )
    from dpo_dist.model.files.stops import find_stop_ids
    from dpo_dist.model.flops import REACHED_SHARES, matmul_peak
    from dpo_dist.model.generation import (
        NotFiniteError,
        WrongGenerationError,
        can_mix_lengths,
        extend,
        image_inputs,
    )
    from dpo_dist.model.numerics import has_products
    from dpo_dist.model.packed import packed_logps, rope_limit
    from dpo_dist.objective.intervals import Column, bootstrap_intervals, wilson_interval
    from dpo_dist.objective.metrics import PairValues
    from dpo_dist.reference.digest import digest_model
    from dpo_dist.reference.engine import fault_agreement, load_reference
    from dpo_dist.reference.model_source import ModelSource, find_files, find_model
    from dpo_dist.training.evaluation.table import EVALUATION_METRICS, evaluation_cells
    from dpo_dist.training.evaluation.trained_prompts import count_trained
    from dpo_dist.training.export import checkpoint_as_model, merge_adapter, whole_model
    from dpo_dist.training.reporting.history import RunHistory
    from dpo_dist.training.reporting.metrics_log import MetricsRow, final_and_best, finite, is_collapsed
    from dpo_dist.training.reporting.protocols import Reporting
    from dpo_dist.training.start.dry_run import dry_run, start_in_words
    from dpo_dist.training.start.footprint import (
        GPUS_PER_NODE,
        Footprint,
        Shapes,
        policy_without_weights,
        teacher_without_weights,
    )
    from dpo_dist.training.start.inputs import Inputs, check_shapes, on_every_rank
    from dpo_dist.training.start.named_models import locate_model, short_name
    from dpo_dist.training.start.open_run import DEFAULT_TOKENS, Run, joined_run
    from dpo_dist.training.start.preflight import check_groups, check_start
    from dpo_dist.training.start.prepared_data import prepare_data, saved_by_tree

__all__, __getattr__ = lazy_names(__name__, __file__)
