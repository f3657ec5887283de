"""TRL's trainers by one import: `from dpo_dist.trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer`.

They are subclasses of TRL's own, with our forward (`forward.py`) and our reference store (`reference.py`).
"""

from typing import Any

from dpo_dist.foundation.installed import is_installed

_OLD = "in older versions of TRL only"
_OTHERS = {
    "ORPO": "from trl.experimental.orpo; our own run has loss.kind=orpo",
    "CPO": "from trl.experimental.cpo; our own run has loss.kind=cpo and loss.kind=simpo",
    "SimPO": "CPOTrainer from trl.experimental.cpo with loss_type='simpo'; our own run has loss.kind=simpo",
    "BCO": f"{_OLD}; DPOTrainer has loss_type='bco_pair'",
    "OnlineDPO": "from trl.experimental.online_dpo; dpo-dist pairs makes pairs by the policy",
    "GKD": "from trl.experimental.gkd",
    **dict.fromkeys(("SFT", "Reward", "GRPO", "RLOO", "Distillation"), "from trl"),
    **dict.fromkeys(("PPO", "PRM", "XPO", "NashMD", "IterativeSFT", "DDPO", "AlignProp"), _OLD),
}
"""Where other trainers of TRL are, by the name without `Trainer` or `Config`."""

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "ModelConfig",
    "ScriptArguments",
    "TrlParser",
    "get_peft_config",
]


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for: TRL takes seconds."""
    if name in __all__:
        if not is_installed("trl"):
            raise ImportError(f"dpo_dist.trl.{name} needs TRL: pip install 'dpo_dist[trl]'")
        import trl  # noqa: PLC0415  (slow)

        from dpo_dist.trl import older_names, trainers  # noqa: PLC0415

        of_ours = vars(trainers) | vars(older_names)
        return of_ours[name] if name in of_ours else getattr(trl, name)
    kind = name.removesuffix("Trainer").removesuffix("Config")
    if kind in _OTHERS and kind != name:
        raise ImportError(f"dpo_dist.trl has the trainers of DPO and KTO only; {name}: {_OTHERS[kind]}")
    if not name.startswith("_") and is_installed("trl"):
        import trl  # noqa: PLC0415

        if name in trl.__all__:  # the other names that scripts of DPO and KTO import: get_dataset, callbacks
            return getattr(trl, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
