"""Write a model or an adapter, with its tokenizer, as a folder that transformers or peft loads."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dpo_dist.atomic import staged_folder
from dpo_dist.errors import CheckpointError

_REMEDY = "free disk space, or name another folder"


def write_model_folder(
    folder: Path,
    causal_lm: Any,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    card: Callable[[], str] | None = None,
    remedy: str = _REMEDY,
) -> None:
    """Write `folder`, which appears whole or not at all; an older one is replaced.

    Args:
        folder: its final name.
        causal_lm: the transformers model; its tensors are not used.
        weights: trained weights by transformers name; taken out while they are written.
        tokenizer: written beside them.
        card: returns the content of README.md; None or "": there is none.
        remedy: of a full disk.

    Raises:
        CheckpointError: it cannot be written.
    """
    with writing_errors(folder, remedy), staged_folder(folder) as temporary:
        causal_lm.save_pretrained(temporary, state_dict=weights, max_shard_size="5GB")
        tokenizer.save_pretrained(temporary)
        if card is not None and (text := card()):
            (temporary / "README.md").write_text(text, encoding="utf-8")


@contextlib.contextmanager
def writing_errors(folder: Path, remedy: str = _REMEDY) -> Iterator[None]:
    """Raise a `CheckpointError` for a file of `folder` that cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            "the trained model cannot be written", where=str(folder), got=str(error), remedy=remedy
        ) from error
