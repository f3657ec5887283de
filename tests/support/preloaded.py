"""Imported last by the warm parent: what is slow happens once, and its heap is frozen.

Its processes draw no curves, which cold runs do, do not wait for the disk, as the machine does not fail, and
compose equal configurations once. All this is a third of a short run.
"""

import gc
import importlib
from functools import cache
from unittest import mock

from deepspeed.utils import numa
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from dpo_dist.config.load import load_run_config
from dpo_dist.tools.shared.pages.render import TEMPLATES
from tests.support.composed import compose_once

LATE = (
    "PIL.PngImagePlugin",
    "deepspeed.moe.ep_experts",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.utils.pin_memory",
    "dpo_dist.config.command_line",
    "dpo_dist.verbs.named_models",
    "dpo_dist.training.start.preflight",
    "matplotlib.ticker",
    "pandas",  # which pyarrow imports
    "pyarrow.pandas_compat",
    "transformers.models.qwen2.tokenization_qwen2",
)
"""Modules that a run imports when it first needs them."""

for name in LATE:
    importlib.import_module(name)
get_checkpoint_conversion_mapping("qwen2")
mock.patch("hydra.compose", compose_once).start()
for choices in ((), ("parallelism=ddp",), ("parallelism=zero2",), ("parallelism=ddp", "tracking=off")):
    load_run_config(["model.path=model", "data.train=[train.jsonl]", "tracking.wandb=off", *choices])
for template in ("base.jinja", "macros.jinja", "run.jinja", "svg.jinja"):
    TEMPLATES.get_template(template)
mock.patch("dpo_dist.tools.report.recorder.draw_curves").start()
mock.patch("os.fsync").start()
mock.patch("deepspeed.utils.numa.get_numa_cores", cache(numa.get_numa_cores)).start()  # 30 processes a run
# Garbage collection in a forked process skips the million objects of its parent, whose pages stay shared.
gc.collect()
gc.freeze()
