"""Load the policy at its start: model, adapter, engine."""

from pathlib import Path

from dpo_dist.config.adapter_schema import AdapterConfig, splits_base
from dpo_dist.config.checkpoint_folders import checkpoint_folders
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.distributed.checkpoint_manifest import check_sealed, seal
from dpo_dist.distributed.engine import PolicyEngine
from dpo_dist.distributed.settling import settle_engine
from dpo_dist.distributed.world import World
from dpo_dist.model.adapter_files import initial_values
from dpo_dist.model.adapter_init import write_initial
from dpo_dist.model.adapters import TRAINED, add_adapter
from dpo_dist.model.head import PackedCausalLM
from dpo_dist.model.load import load_packed
from dpo_dist.training.data_setup import ModelInputs
from dpo_dist.training.run_start import write_on_main


def load_policy(config: RunConfig, inputs: ModelInputs, world: World) -> PolicyEngine:
    """Return the policy at its start, with its adapter if it has one; collective."""
    folder = inputs.policy_files.folder
    model = load_packed(folder, config.model, config.data.max_length, world.device, sequence=world.sequence)
    if config.model.adapter is not None:
        _add_adapter(model, config, inputs, world)
    policy = PolicyEngine(model, config.optim, world, config.trainer.ema_decay)
    settle_engine(policy, config.data.max_length, world, trains=True)
    return policy


def _add_adapter(model: PackedCausalLM, config: RunConfig, inputs: ModelInputs, world: World) -> None:
    """Add the adapter; only the first start computes the values that it takes from the weights. Collective.

    Another device or library could compute other ones.
    """
    run, seed, start = RunFolder.of(config), config.trainer.seed, inputs.policy_files.adapter
    adapter, resumes = config.model.adapter, world.on_main(lambda: bool(checkpoint_folders(run.checkpoints)))
    initial = world.on_main(lambda: _initial(adapter, run.initial_adapter)) if resumes else None
    add_adapter(model, config.model, seed, start, initial)
    if splits_base(adapter.init) and not resumes:
        folder = run.initial_adapter
        write_on_main(lambda: write_initial(model.causal_lm, TRAINED, folder, seal), run, world)


def _initial(adapter: AdapterConfig, folder: Path) -> Path | None:
    check_sealed(folder)
    return initial_values(adapter, folder)
