"""`--check` of `compare`: load and check everything that needs no weights and no GPU; writes nothing."""

from collections.abc import Sequence

from dpo_dist.comparison.judging import has_judge
from dpo_dist.comparison.prompts import prompt_records
from dpo_dist.comparison.startup import KEY, Compared, Kind
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.sources import pinned
from dpo_dist.generation.preflight import (
    Fault,
    ask_judge,
    check_writable,
    describe_responder,
    fault_of,
    first_records,
)
from dpo_dist.generation.sampling.responder import find_description, open_responder


def rehearse_comparison(config: RunConfig, models: Sequence[Compared]) -> str:
    """Load what `compare` loads before weights, ask the judge, and read the first records of each source.

    Returns:
        The findings, as lines for the screen.

    Raises:
        ConfigError: a model, its tokenizer, the judge or the run directory cannot be used.
        DataError: a source cannot be read, or none of its first records can be used.
    """
    check_writable(RunFolder.of(config).path, "run.dir")
    lines: list[tuple[str, str]] = []
    faults: dict[str, Fault] = {}
    for model in models:
        if model.kind is Kind.checkpoint:
            lines.append(("model", f"{model.name}: {model.location}, a checkpoint"))
            continue
        responder = open_responder(find_description(model.location, config, KEY), config, KEY)
        lines.append(("model", f"{model.name}: {describe_responder(responder)}"))
        faults[f"{model.name}: "] = fault_of(responder, config.data, config.compare.max_new_tokens)
    lines.append(("judge", ask_judge(config) if has_judge(config.pairs) else "none: no scores, no win rates"))
    for source in config.data.eval_sources:
        for whose, fault in faults.items():
            records = prompt_records(pinned(source, None))
            lines.append(("held out", whose + first_records(records, source, config.data, fault)))
    findings = "".join(f"  {label + ':':<10}{text}\n" for label, text in lines)
    return f"check passed: everything that needs no weights and no GPU is in order\n{findings}"
