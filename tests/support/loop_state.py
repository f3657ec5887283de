"""The state of a checkpoint, as training writes it."""

import json
from pathlib import Path
from typing import Any

_COUNTS = {"read": 4, "kept": 4, "pairs": 4, "dropped": {}}
_SOURCE = {"label": "a", "path": "a.jsonl", **_COUNTS}


def write_loop_state(checkpoint: Path, **others: Any) -> None:
    """Write state.json of a run with one source of four pairs, after one of two steps."""
    state = {
        **{"model": "m", "step": 1, "steps": 2, "pairs_seen": 4, "running": {}},
        "reference_report": {"mode": "cached", "hits": 4, "computed": 4},
        "counts": {"train": {**_COUNTS, "sources": [_SOURCE]}},
        **others,
    }
    (checkpoint / "state.json").write_text(json.dumps(state))
