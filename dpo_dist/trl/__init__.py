"""TRL's trainers by one import: `from dpo_dist.trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer`.

They are subclasses of TRL's own, with our forward (`forward.py`) and our reference store (`reference.py`).
"""

from typing import Any

from dpo_dist.foundation.installed import install_extra, is_installed

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
    value = getattr(trl, name)
    if name.endswith("Trainer"):
        say_once(f"{name} is TRL's own: its rows are padded")
    return value
