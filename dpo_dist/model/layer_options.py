"""Options of a model that its layers may have in different values: heads, windows, experts."""

from collections.abc import Sequence
from typing import Any


def layer_configs(text: Any) -> Sequence[Any]:
    """Return the configuration of each layer of a text model, one for all if they are equal.

    Of a configuration whose layers differ (Gemma 4, or `per_layer_config` in config.json), transformers
    refuses to read an option that they do not share.

    Args:
        text: a transformers configuration without parts for images or sounds.
    """
    layers: Sequence[Any] = text.per_layer_config if text.is_heterogeneous else [text]
    return layers


def layer_values(text: Any, option: str) -> list[Any]:
    """Return the different values of an option in the layers of a text model, None where there is none.

    Args:
        text: a transformers configuration without parts for images or sounds.
        option: its name.
    """
    values: list[Any] = []
    for layer in layer_configs(text):
        value = getattr(layer, option, None)
        if value not in values:
            values.append(value)
    return values
