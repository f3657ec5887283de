"""TRL's trainers by one import: `from dpo_dist.trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer`.

They are subclasses of TRL's own, with our forward (`forward.py`) and our reference store (`reference.py`).
"""

from typing import Any

from dpo_dist.foundation.installed import install_extra, is_installed

_OLD = "in older versions of TRL only"
_OTHERS = {
    "ORPO": "from trl.experimental.orpo; our own run has loss.kind=orpo",
    "CPO": "from trl.experimental.cpo; our own run has loss.kind=cpo and loss.kind=simpo",
    "SimPO": "CPOTrainer from trl.experimental.cpo with loss_type='simpo'; our own run has loss.kind=simpo",
    "BCO": f"{_OLD}; DPOTrainer has loss_type='bco_pair'",
    "OnlineDPO": "from trl.experimental.online_dpo; dpo-dist pairs makes pairs by the policy",
    "GKD": "from trl.experimental.gkd",
    **dict.fromkeys(("PPO", "PRM", "XPO", "NashMD", "IterativeSFT", "DDPO", "AlignProp"), _OLD),
}
"""Where trainers are that `trl` itself does not have, by the name without `Trainer` or `Config`."""

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
    """Import a name when it is asked for: TRL takes seconds. What is not ours is TRL's own."""
    if name.startswith("_") and name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not is_installed("trl"):
        raise ImportError(f"dpo_dist.trl.{name} needs TRL: {install_extra('trl')}")
    import trl  # noqa: PLC0415  (slow)

    from dpo_dist.trl.older_names import DPOConfig, KTOConfig, say_once  # noqa: PLC0415
    from dpo_dist.trl.trainers import DPOTrainer, KTOTrainer  # noqa: PLC0415

    for own in (DPOConfig, DPOTrainer, KTOConfig, KTOTrainer):
        if own.__name__ == name:
            return own
    kind = name.removesuffix("Trainer").removesuffix("Config")
    if not hasattr(trl, name) and kind in _OTHERS and kind != name:
        raise ImportError(f"dpo_dist.trl has the trainers of DPO and KTO only; {name}: {_OTHERS[kind]}")
    value = getattr(trl, name)
    if name.endswith("Trainer"):
        say_once(f"{name} is TRL's own: its rows are padded")
    return value
