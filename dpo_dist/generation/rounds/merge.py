"""Merge the adapter of a round into its base: a model that the next round samples and trains."""

from pathlib import Path

from dpo_dist.atomic import collect_abandoned, staged_folder
from dpo_dist.config.schema import RunConfig


def merge_adapter(adapter: Path, folder: Path, config: RunConfig) -> None:
    """Write the base of an adapter with the adapter's update added to its weights, in `config.model.dtype`.

    A quantized base is merged without its quantization.

    Args:
        adapter: folder of the adapter, which names its base.
        folder: for the model; written whole or not at all.
        config: of the training.

    Raises:
        CheckpointError: `folder` cannot be written.
        ConfigError: base or adapter cannot be read.
    """
    collect_abandoned(folder.parent)  # a whole model, if an earlier start was killed while it wrote one
    # Slow to import.
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    from dpo_dist.generation.sampling.responder import find_model  # noqa: PLC0415
    from dpo_dist.model.adapter_weights import AdapterWeights  # noqa: PLC0415
    from dpo_dist.model.load import TORCH_DTYPES, load_config  # noqa: PLC0415
    from dpo_dist.model.merge import names_in_model, write_merged  # noqa: PLC0415
    from dpo_dist.model.save import copy_tokenizer, writing_errors  # noqa: PLC0415
    from dpo_dist.model.saved_modules import shared_weights  # noqa: PLC0415

    source = find_model(str(adapter), config)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(
            load_config(source.folder, config.model), trust_remote_code=config.model.trust_remote_code
        )
    members = [(1.0, AdapterWeights.of_folder(adapter))]
    dtype, shared = TORCH_DTYPES[config.model.dtype], shared_weights(plain)
    with writing_errors(folder), staged_folder(folder) as temporary:
        write_merged(temporary, source.folder, members, names_in_model(plain), dtype, shared)
        copy_tokenizer(source.tokenizer_folder, temporary)
