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
    ACCURACIES ALL AUC DEFAULT_TOKENS EVALUATION_METRICS GPUS_PER_NODE LAST_EVALUATION LOSS_METRICS
    MAIN METRICS PREFIX REACHED_SHARES TORCH_DTYPES UNSET ZERO_STAGES Column Direction Dtype
    Extension Footprint LossConfig LossKind MetricsLog MetricsRow ModelConfig Offload PackedCausalLM
    ParallelismKind PathBelow PreferenceDataset ReferenceMode Rule Run RunConfig RunFolder
    RunHistory Shapes TrainerConfig Verb bootstrap_intervals check_rules check_start check_writable
    checked_console complete_config count_trained evaluation_cells existing_run final_and_best
    find_metric finite is_checkpoint is_collapsed kinds_in load_run_config locate_model
    logps_by_side loss_unit matmul_peak metrics_by_source needs_of packed_logps
    policy_without_weights results_name run_keys run_verb short_name strip_key to_unset to_yaml
    train unused wilson_interval write_evaluation
"""
"""All names of the kit: a new one is a decision."""
ELSEWHERE = {
    "batching.content_keys": "Keys",
    "batching.costs": "ComputeCosts",
    "batching.pack": "joined_inputs",
    "batching.plan": "shares_in_bins",
    "config.advice": "OFF Advice",
    "config.command_line": "write_command",
    "config.compose": "FAILURES Command names_chosen parse_overrides read_keys",
    "config.identity": "settings",
    "config.keys": "group_folders preset_names strip_indices verb_keys",
    "config.load": "differing_keys from_yaml load_command",
    "config.losses": "KINDS balancing_weight kinds_using",
    "config.metrics": """
        ACCURACY_CHART AUC_CHART CUSTOM ENTROPIES EXCESS MARGIN_PERCENTILES MISMATCH PAIR_METRICS
        TERMS is_evaluation
    """,
    "config.mistakes": "as_tree composition_error fits likely_name",
    "config.rules": """
        HOLD_OUT JUDGED_METRICS best_direction resolve_reference rules_of value_at
        without_evaluations
    """,
    "config.run_folder": "checkpoint_name checkpoint_step",
    "config.schema": """
        KIND_OF_STAGE SCHEMA AttentionBackend ConsoleStyle ExportedWeights FusedLayers ImagesConfig
        OptimConfig ParallelismConfig ReferenceConfig TrackerName
    """,
    "config.verbs": "VERBS",
    "distributed": "deepspeed_config",
    "distributed.deepspeed_config": "policy_config unsharded_loading",
    "distributed.memory": "explain_out_of_memory return_memory",
    "distributed.processes.world": "Interrupted Stops",
    "distributed.zero": "Engine",
    "encoded.build": "EncodingProgress Preparation no_progress",
    "encoded.dataset": "PromptImages check_fits_loss check_ids_in_vocabulary open_dataset",
    "encoded.store": "EncodedSource",
    "encoded.workers": "in_chunks in_order",
    "model.architectures": "context_length",
    "model.attention.kernels": "check_kernel choose_backend",
    "model.exactness": "LONGEST Agree Rounding StartCheck changes trial_examples",
    "model.files.folder": """
        ADAPTER_CONFIG check_tokenizer_files description_folder hub_commit is_adapter
        local_model_folder model_folder read_model_json start_folder tokenizer_folder
    """,
    "model.files.load": """
        Encoder check_contents_at_hand load_config load_encoder load_packed load_tokenizer
        load_weights tokenizer_digest
    """,
    "model.files.manifest": "check_base check_undamaged write_manifest",
    "model.files.save": "copy_tokenizer write_merged writing_errors",
    "model.files.stops": "find_stop_ids folder_stops write_stops",
    "model.images": "ImageReader",
    "model.library_internals": "fill_conversions",
    "model.lora": "TRAINED adapter_off add_saved load_adapter",
    "model.numerics": "has_fp16_products",
    "model.packed": "accepted_inputs reset_rope rope_limit",
    "objective.metrics": "PairColumn PairValues",
    "reference.digest": "digest_model",
    "reference.engine": "fault_agreement load_reference scoring_config",
    "reference.store": "LogpStore StoredLogps read_fingerprints",
    "training.clock": "WORKS Work",
    "training.export": "checkpoint_as_model",
    "training.reporting.protocols": "OnMoment Reporting",
    "training.reporting.recorder": "OnRow PlainRecorder opened_trackers",
    "training.start.dry_run": "dry_run start_in_words",
    "training.start.environment": "PACKAGES package_versions",
    "training.start.inputs": "Inputs on_every_rank",
    "training.start.open_run": "has_bf16_products join",
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
    imports = {name: home for home, name in taken(ast.parse((PACKAGE / "kit.py").read_text()))}
    assert sorted(imports) == sorted(dpo_dist.kit.__all__) == sorted(NAMES.split())
    for name, home in imports.items():
        assert getattr(dpo_dist.kit, name) is getattr(sys.modules[home], name)
        assert f"`{name}`" in str(dpo_dist.kit.__doc__), name
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        _ = dpo_dist.kit.Trainer
