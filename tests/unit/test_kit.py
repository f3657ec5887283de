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
    ACCURACIES ALL AUC EVALUATION_METRICS LOSS_METRICS MAIN METRICS PREFIX UNSET Column Direction
    Dtype Extension LossConfig LossKind MetricsRow ModelConfig PackedCausalLM PathBelow
    PreferenceDataset ReferenceMode Rule Run RunConfig RunFolder Verb bootstrap_intervals
    check_rules check_start check_writable checked_console count_trained evaluation_cells
    find_metric finite is_checkpoint load_run_config locate_model needs_of packed_logps results_name
    run_keys run_verb saved_config short_name to_unset to_yaml train unused wilson_interval
    write_evaluation
"""
"""All names of the kit: a new one is a decision."""
ELSEWHERE = {
    "batching.content_keys": "Keys",
    "batching.costs": "Arrangement ComputeCosts",
    "batching.pack": "joined_inputs",
    "batching.plan": "shares_in_bins",
    "config.advice": "OFF Advice",
    "config.command_line": "write_command",
    "config.compose": "FAILURES Command names_chosen parse_overrides read_keys",
    "config.identity": "kinds_in settings",
    "config.keys": "group_folders preset_names strip_indices verb_keys",
    "config.load": "complete_config differing_keys from_yaml load_command read_saved",
    "config.losses": "KINDS balancing_weight kinds_using loss_unit",
    "config.metrics": """
        ACCURACY_CHART AUC_CHART CUSTOM ENTROPIES EXCESS MARGIN_PERCENTILES MISMATCH PAIR_METRICS
        TERMS is_evaluation
    """,
    "config.mistakes": "as_tree composition_error fits likely_name",
    "config.rules": """
        HOLD_OUT JUDGED_METRICS best_direction resolve_reference rules_of value_at
        without_evaluations
    """,
    "config.run_folder": "LAST_EVALUATION checkpoint_name checkpoint_step existing_run strip_key",
    "config.schema": """
        KIND_OF_STAGE SCHEMA ZERO_STAGES AttentionBackend ConsoleStyle ExportedWeights FusedLayers
        ImagesConfig Offload OptimConfig ParallelismConfig ParallelismKind ReferenceConfig
        TrackerName TrainerConfig
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
    "model.architectures": "context_length recorded_arrangement",
    "model.attention.kernels": "check_kernel choose_backend",
    "model.exactness": "LONGEST Agree Rounding StartCheck changes trial_examples",
    "model.files.folder": """
        ADAPTER_CONFIG check_tokenizer_files description_folder hub_commit is_adapter
        local_model_folder model_folder read_model_json start_folder tokenizer_folder
    """,
    "model.files.load": """
        TORCH_DTYPES Encoder check_contents_at_hand load_config load_encoder load_packed
        load_tokenizer load_weights tokenizer_digest without_weights
    """,
    "model.files.manifest": "check_base check_undamaged write_manifest",
    "model.files.save": "copy_tokenizer write_merged writing_errors",
    "model.files.stops": "find_stop_ids folder_stops write_stops",
    "model.flops": "REACHED_SHARES matmul_peak recomputed_share step_flops visited_experts",
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
    "training.reporting.metrics_log": """
        MetricsLog final_and_best is_collapsed logps_by_side metrics_by_source read_latest_rows
        stored_rows write_tables
    """,
    "training.reporting.protocols": "OnMoment Reporting",
    "training.reporting.recorder": "OnRow PlainRecorder opened_trackers",
    "training.start.dry_run": "dry_run start_in_words",
    "training.start.environment": "PACKAGES package_versions",
    "training.start.footprint": """
        BYTES_PER_QUANTIZED_WEIGHT GPUS_PER_NODE Footprint disk_bytes footprint host_bytes
        quantization_notes quantized_weights state_bytes stored_notes
    """,
    "training.start.inputs": "Inputs on_every_rank",
    "training.start.open_run": "DEFAULT_TOKENS has_bf16_products join",
    "training.start.run_state": "read_state",
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
