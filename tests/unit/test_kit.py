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
    ACCURACIES AGREEMENT ALL AUC CUSTOM DEFAULT_TOKENS EVALUATION_METRICS EXCESS FAILURES GPUS_PER_NODE
    KINDS LOSS LOSS_METRICS MAIN METRICS PREFIX REACHED_SHARES TERMS
    TORCH_DTYPES UNSET VERBS Column Direction Dtype Engine Extension Footprint
    ImagesConfig Inputs Interrupted LossConfig LossKind MetricsRow ModelConfig ModelSource
    NotFiniteError Offload PairValues ParallelismKind PathBelow PreferenceDataset PromptImages
    ReferenceMode Reporting Rule Run RunConfig RunFolder RunHistory Shapes Stops Verb
    WrongGenerationError bootstrap_intervals can_mix_lengths changed_keys
    check_groups check_rules check_shapes check_start check_tokenizer_files check_writable
    checkpoint_as_model checkpoint_step complete_config context_length count_trained description_folder
    digest_model dry_run evaluation_cells existing_run explain_out_of_memory explained extend
    fault_agreement final_and_best find_files find_metric find_model find_stop_ids finite fits
    has_products image_inputs in_chunks in_order is_checkpoint is_collapsed is_evaluation joined_run
    kinds_using load_config load_encoder load_reference load_run_config load_tokenizer load_weights
    local_model_folder locate_model loss_kinds loss_unit matmul_peak merge_adapter model_folder needs_of
    no_progress on_every_rank packed_logps parse_overrides policy_without_weights prepare_data read_keys
    return_memory rope_limit run_keys run_verb saved_by_tree saved_config short_name
    start_in_words strip_indices strip_key teacher_without_weights to_unset to_yaml tokenizer_digest
    unsharded_loading unused unused_beside value_at verb_keys whole_model wilson_interval
    without_evaluations write_command
"""
"""All names of the kit: a new one is a decision."""
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
    assert others == set(), "there is no other door"


def test_the_trainer_takes_nothing_from_the_kit() -> None:
    for module, tree in modules().items():
        assert module.startswith(GUESTS) or KIT not in {home for home, _ in taken(tree)}, module


def test_the_kit_has_each_of_its_names_from_the_module_that_defines_it() -> None:
    tree = ast.parse((PACKAGE / "kit.py").read_text())
    imports = {name: home for home, name in taken(tree) if home != "dpo_dist.foundation.lazy"}
    assert sorted(imports) == sorted(NAMES.split())
    for name, home in imports.items():
        assert getattr(dpo_dist.kit, name) is getattr(sys.modules[home], name)
        assert f"`{name}`" in str(dpo_dist.kit.__doc__), name
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = dpo_dist.kit.Trainer
