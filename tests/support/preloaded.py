"""Imported last by the warm parent: slow first calls of libraries happen once, and its heap is frozen."""

import gc
import importlib
from io import BytesIO

from matplotlib.figure import Figure
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from dpo_dist.config.load import load_run_config
from dpo_dist.insight.pages.render import TEMPLATES

LATE = (
    "PIL.PngImagePlugin",
    "deepspeed.moe.ep_experts",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.utils.pin_memory",
    "dpo_dist.config.command_line",
    "dpo_dist.training.preflight",
    "pandas",  # which pyarrow imports
    "pyarrow.pandas_compat",
    "transformers.models.qwen2.tokenization_qwen2",
)
"""Modules that a run imports when it first needs them."""

for name in LATE:
    importlib.import_module(name)
get_checkpoint_conversion_mapping("qwen2")
load_run_config(["model.path=model", "data.train=[train.jsonl]", "tracking.wandb=off"])
for template in ("base.jinja", "macros.jinja", "run.jinja", "svg.jinja"):
    TEMPLATES.get_template(template)
figure = Figure()
figure.add_subplot().set_title("0")
figure.savefig(BytesIO(), format="png")
# Garbage collection in a forked process skips the million objects of its parent, whose pages stay shared.
gc.collect()
gc.freeze()
