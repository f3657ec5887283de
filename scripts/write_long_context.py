"""Write the tables of docs/long_context.md from the formulas in dpo_dist/model/context_memory.py.

Run it after a change of a formula: `.venv/bin/python scripts/write_long_context.py`.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dpo_dist.model.context_memory import (
    ModelShape,
    Placement,
    device_bytes,
    layer_input_bytes,
    micro_batch_flops,
)

PAGE = Path(__file__).resolve().parents[1] / "docs" / "long_context.md"
MODELS = {
    "7B (Qwen2.5)": ModelShape(28, 3584, 28, 4, 128, 18944, 152064),
    "14B (Qwen2.5)": ModelShape(48, 5120, 40, 8, 128, 13824, 152064),
    "32B (Qwen2.5)": ModelShape(64, 5120, 40, 8, 128, 27648, 152064),
    "70B (Llama 3)": ModelShape(80, 8192, 64, 8, 128, 28672, 128256),
}
TOKENS = {"32k": 2**15, "64k": 2**16, "128k": 2**17}
GPUS = (8, 16, 32, 64)
GPUS_OF_A_NODE = 8
# Of 80 GB; the allocator's fragments take the rest.
USABLE = 0.9 * 80e9
TILE_TOKENS = 2048
H100 = 989e12
UTILISATION = 0.4


def cell(shape: ModelShape, gpus: int, tokens: int) -> str:
    """Return the settings with which a micro-batch fits: few processes that share it, and no more options.

    With inputs in host memory many processes share it: each then has fewer of them.
    """
    few, many = (1, 2, 4, 8), (8, 4, 2, 1)
    options = ((None, False, few, ""), (TILE_TOKENS, False, few, " t"), (TILE_TOKENS, True, many, " t o"))
    for tile, offloads, groups, letters in options:
        for ranks in groups:
            placement = Placement(gpus, ranks, tile, offloads)
            if shape.heads % ranks == 0 and device_bytes(shape, placement, tokens) <= USABLE:
                host = layer_input_bytes(shape, placement, tokens) * GPUS_OF_A_NODE
                return f"{ranks}{letters}" + (f" ({host / 1e9:,.0f} GB)" if offloads else "")
    return "-"


def memory_table() -> str:
    """Return the table of settings by model, GPUs and tokens."""
    rows = [
        (
            name if gpus == GPUS[0] else "",
            str(gpus),
            f"{18 * shape.parameters / gpus / 1e9:,.0f} GB",
            *(cell(shape, gpus, tokens) for tokens in TOKENS.values()),
        )
        for name, shape in MODELS.items()
        for gpus in GPUS
    ]
    return _table(("model", "GPUs", "states on each", *TOKENS), rows)


def time_table() -> str:
    """Return the table of FLOPs by model and tokens."""
    rows = []
    for name, shape in MODELS.items():
        cells = []
        for tokens in TOKENS.values():
            matrices, attention = micro_batch_flops(shape, tokens)
            seconds = (matrices + attention) / (H100 * UTILISATION)
            cells.append(f"{attention / (matrices + attention):.0%}, {seconds:,.0f} s")
        rows.append((name, *cells))
    return _table(("model", *TOKENS), rows)


def page() -> str:
    """Return the text of the page with its tables."""
    text = PAGE.read_text()
    for name, table in (("memory", memory_table()), ("time", time_table())):
        text, replaced = re.subn(
            rf"(<!-- table: {name}[^\n]*-->\n\n).*?(\n<!-- end of table -->)",
            lambda found, table=table: f"{found[1]}{table}{found[2]}",  # type: ignore[misc]
            text,
            flags=re.DOTALL,
        )
        assert replaced == 1, f"{PAGE} must have one pair of markers for {name}"
    return text


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page())
