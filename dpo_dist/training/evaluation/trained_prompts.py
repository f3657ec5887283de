"""Count evaluation prompts on which a model was trained, from the data of its run."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np

from dpo_dist.config.load import saved_config
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.data import DataSource, Part, PreferenceRecord, SourceConfig, prompt_hash
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import DpoDistError, first_line


def count_trained(model: str, prompts: Iterable[int], unit: str, console: Console) -> int | None:
    """Return on how many of these prompts (by `prompt_hash`) a model was trained; print a warning if any.

    None if no run trained the model, or, with a note, if its run's data cannot be read. `unit`: pair or
    record.
    """
    place = Path(model).expanduser().resolve()
    folders = map(RunFolder, [place, *place.parents[:2]] if place.exists() else [])  # else a name of the hub
    run = next((folder for folder in folders if folder.state.is_file()), None)
    if run is None:
        return None
    try:
        training_prompts = _training_prompts(run.config)
    except (OSError, ValueError, DpoDistError) as error:
        console.say(
            f"note: it is not known whether {model} was trained on these {unit}s: {first_line(error)}"
        )
        return None
    hashes = list(prompts)
    count = sum(prompt in training_prompts for prompt in hashes)
    if count:
        console.warn(
            f"{count:,} of {len(hashes):,} {unit}s are not held out: {model} was trained on their "
            "prompts, so the results say little about new prompts"
        )
    return count


@cache
def _training_prompts(file: Path) -> frozenset[int]:
    data = saved_config(file).data
    held_out = np.array(sorted(_prompts(data.eval)), np.uint64) if data.drop_eval_prompts else None
    part = Part.to_train(data, held_out)
    return frozenset(filter(part.has, _prompts(data.train)))


def _prompts(sources: Iterable[SourceConfig]) -> set[int]:
    prompts = set[int]()
    for source in sources:
        for raw in DataSource(source).pinned().prompts():
            record = raw.readable()
            if isinstance(record, PreferenceRecord):
                prompts.add(prompt_hash(record.prompt, record.images))
    return prompts
