"""The kit: what tools take from the trainer."""

import ast
import sys

import pytest

import dpo_dist.kit
from tests.unit.test_border import taken
from tests.unit.test_layering import PACKAGE, modules

pytestmark = pytest.mark.slow

KIT = "dpo_dist.kit"
NAMES = """
    ACCURACIES ALL AUC CUSTOM DEFAULT_TOKENS EVALUATION_METRICS FAILURES GPUS_PER_NODE LOSS
    LOSS_METRICS MAIN METRICS PREFIX REACHED_SHARES TERMS TORCH_DTYPES UNSET Column Direction Dtype
    Engine Extension Footprint LossConfig LossKind MetricsRow ModelConfig ModelSource NotFiniteError
    Offload ParallelismKind PathBelow PreferenceDataset
    ReferenceMode Rule Run RunConfig RunFolder RunHistory Shapes Verb WrongGenerationError
    bootstrap_intervals can_mix_lengths check_groups check_rules check_shapes
    check_start check_writable checkpoint_as_model complete_config context_length
    count_trained description_folder digest_model dry_run evaluation_cells existing_run extend
    final_and_best find_files find_metric find_model find_stop_ids finite fits
    has_products image_inputs in_chunks is_checkpoint is_collapsed joined_run kinds_using
    load_config load_encoder load_run_config local_model_folder locate_model
    loss_kinds loss_unit matmul_peak merge_adapter needs_of packed_logps
    parse_overrides policy_without_weights prepare_data results_name return_memory run_keys run_verb
    saved_by_tree short_name strip_key teacher_without_weights to_unset to_yaml
    unsharded_loading unused unused_beside value_at wilson_interval write_command
"""
"""All names of the kit: a new one is a decision."""
ELSEWHERE = {
    "config.compose": "read_keys",
    "config.identity": "settings",
    "config.keys": "strip_indices verb_keys",
    "config.load": "changed_keys saved_config",
    "config.losses": "KINDS",
    "config.metrics": "EXCESS GROUP_METRICS MARGIN_PERCENTILES is_evaluation",
    "config.mistakes": "explained",
    "config.rules": "without_evaluations",
    "config.run_folder": "checkpoint_step",
    "config.schema": "ExportedWeights ImagesConfig",
    "config.verbs": "VERBS",
    "distributed.memory": "explain_out_of_memory",
    "distributed.processes.world": "Interrupted Stops",
    "encoded.build": "EncodingProgress no_progress",
    "encoded.dataset": "PromptImages",
    "encoded.workers": "in_order",
    "model.exactness": "Agree",
    "model.files.folder": "check_tokenizer_files model_folder",
    "model.files.load": "check_contents_at_hand load_tokenizer load_weights tokenizer_digest",
    "model.packed": "rope_limit",
    "objective.metrics": "PairValues",
    "reference.engine": "fault_agreement load_reference",
    "training.reporting.protocols": "Reporting",
    "training.start.dry_run": "start_in_words",
    "training.start.inputs": "Inputs on_every_rank",
}
"""What tools take from modules of the trainer themselves, by the module: this list may only shrink."""
GUESTS = ("dpo_dist.tools.", "dpo_dist.compat.")
OPEN = ("dpo_dist.kit", "dpo_dist.data", "dpo_dist.foundation", *(guest.rstrip(".") for guest in GUESTS))
"""Rooms from which a tool takes what it likes; test_border.py lists what it takes from `data`."""


def test_a_tool_takes_from_the_trainer_what_the_kit_has() -> None:
    used = set[str]()
    others = set[tuple[str, str]]()
    for module, tree in modules().items():
        if module.startswith(GUESTS):
            for home, name in taken(tree):
                if home == KIT:
                    used.add(name)
                elif not f"{home}.{name}.".startswith(tuple(f"{room}." for room in OPEN)):
                    others.add((home.removeprefix("dpo_dist").removeprefix("."), name))
    assert used == set(NAMES.split())
    assert others == {(home, name) for home, names in ELSEWHERE.items() for name in names.split()}


def test_the_trainer_takes_nothing_from_the_kit() -> None:
    for module, tree in modules().items():
        assert module.startswith(GUESTS) or KIT not in {home for home, _ in taken(tree)}, module


def test_the_kit_has_each_of_its_names_from_the_module_that_defines_it() -> None:
    tree = ast.parse((PACKAGE / "kit.py").read_text())
    imports = {name: home for home, name in taken(tree)}
    assert sorted(imports) == sorted(NAMES.split())
    for name, home in imports.items():
        assert getattr(dpo_dist.kit, name) is getattr(sys.modules[home], name)
        assert f"`{name}`" in str(dpo_dist.kit.__doc__), name
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = dpo_dist.kit.Trainer
