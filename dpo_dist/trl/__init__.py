"""TRL's trainers by one import: `from dpo_dist.trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer`.

The arguments of TRL 1.16 are translated by the table of `dpo-dist convert` into a file in `output_dir`, with
which `api.train` runs; `dpo-dist train` can go on with it.

The way of an argument, such as `DPOConfig(loss_type="ipo")`, to a key of ours: `tools/convert/arguments.py`
has the class, and returns the keys of a file of TRL; `command.py` collects them; `tools/convert/translate.py`
translates them by the table `config/other_trainers.yaml`.
"""

from dpo_dist.tools.convert.arguments import DPOConfig, KTOConfig
from dpo_dist.trl.trainer import DPOTrainer, KTOTrainer

__all__ = ["DPOConfig", "DPOTrainer", "KTOConfig", "KTOTrainer"]
