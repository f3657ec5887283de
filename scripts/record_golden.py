"""Record the golden trajectories again: `python scripts/record_golden.py`.

Only if numbers were changed on purpose; give the reason in the commit message.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.golden.scenario import GOLDEN, SCENARIOS, overrides, write_scenario
from tests.support.launch import history, train


def main() -> None:
    recorded = {}
    with tempfile.TemporaryDirectory() as name:
        folder = write_scenario(Path(name))
        for scenario in SCENARIOS:
            train([*overrides(folder, scenario), f"run.dir={name}/run-{scenario}"])
            recorded[scenario] = history(folder / f"run-{scenario}")
            print(f"{scenario}: {len(recorded[scenario])} rows")
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
