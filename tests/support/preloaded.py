"""Imported last by the warm parent: what is slow happens once, and its heap is frozen.

Its processes draw no curves and measure no peak of matrix products, which cold runs do, and do not wait
for the disk, as the machine does not fail. All this is half of a short run.
"""

import gc
import importlib
import importlib.metadata
from functools import cache
from unittest import mock

from deepspeed.utils import numa
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from dpo_dist.config.keys import verb_keys
from dpo_dist.config.load import load_run_config
from dpo_dist.config.verbs import VERBS
from dpo_dist.distributed.processes.world import LIBRARIES
from dpo_dist.foundation.user_code import loaded_sources
from dpo_dist.training.start.environment import package_versions

LATE = (
    "PIL.PngImagePlugin",
    "datasets",
    "deepspeed.comm.mori",
    "deepspeed.moe.ep_experts",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.utils.pin_memory",
    "distutils.ccompiler",
    "dpo_dist.config.command_line",
    "dpo_dist.tools.compare.models",
    "dpo_dist.tools.doctor.page",
    "dpo_dist.tools.pairs.make_pairs",
    "dpo_dist.training.start.named_models",
    "dpo_dist.training.start.preflight",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "encodings.utf_8_sig",
    "hypothesis.strategies",  # which modules of tests import
    "matplotlib.ticker",
    "pandas",  # which pyarrow imports
    "peft.tuners.lora.bnb",
    "peft.utils.transformers_weight_conversion",
    "pyarrow.acero",
    "pyarrow.pandas_compat",
    "pyarrow.vendored.version",
    "pytest",  # which the modules of tests import whose functions run there
    "torch._subclasses.schema_check_mode",
    "torch.profiler._cupti_monitor",
    "transformers.models.audioflamingo3",
    "transformers.models.qwen2.tokenization_qwen2",
)
"""Modules that verbs import when they first need them."""

for name in LATE:
    importlib.import_module(name)
get_checkpoint_conversion_mapping("qwen2")
for choices in ((), ("parallelism=ddp",), ("parallelism=zero2",), ("parallelism=ddp", "tracking=off")):
    load_run_config(["model.path=model", "data.train=[train.jsonl]", "tracking=off", *choices])
for verb in VERBS:
    verb_keys(verb)
mock.patch("importlib.metadata.version", cache(importlib.metadata.version)).start()
package_versions()
loaded_sources(LIBRARIES)
mock.patch("dpo_dist.tools.report.recorder.draw_curves").start()
mock.patch("dpo_dist.training.run.matmul_peak", return_value=1e11).start()
mock.patch("os.fsync").start()
mock.patch("deepspeed.utils.numa.get_numa_cores", cache(numa.get_numa_cores)).start()  # 30 processes a run
# Garbage collection in a forked process skips the million objects of its parent, whose pages stay shared.
gc.collect()
gc.freeze()
