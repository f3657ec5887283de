"""Merge the adapter of a round into its base: a model that the next round samples and trains."""

from dataclasses import replace
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
        ConfigError: base or adapter cannot be loaded.
    """
    collect_abandoned(folder.parent)  # a whole model, if an earlier start was killed while it wrote one
    import torch  # noqa: PLC0415  (slow)

    from dpo_dist.generation.sampling.responder import find_model, load_responder  # noqa: PLC0415
    from dpo_dist.model.load import load_tokenizer  # noqa: PLC0415

    source = find_model(str(adapter), config)
    plain = replace(config.model, quantization=None)
    merged = load_responder(source, plain, torch.device("cpu")).merge_and_unload()
    with staged_folder(folder) as temporary:
        merged.save_pretrained(temporary, max_shard_size="5GB")
        load_tokenizer(source.tokenizer_folder, plain).save_pretrained(temporary)
