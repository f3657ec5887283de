"""`--check` of `pairs`: load and check everything that needs no weights and no GPU; writes nothing."""

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice

from dpo_dist.config.data import DataConfig, SourceConfig
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import RunConfig
from dpo_dist.config.verb_options import PairsMethod
from dpo_dist.data.counts import in_one_line
from dpo_dist.data.formats import read_records
from dpo_dist.data.prompts import read_prompts
from dpo_dist.data.records import BadRecord, PreferenceRecord
from dpo_dist.data.sources import pinned
from dpo_dist.foundation.errors import DataError
from dpo_dist.generation.judges.endpoint import EndpointJudge
from dpo_dist.generation.judges.reward_model import check_reward_model
from dpo_dist.generation.pairs.files import good_records
from dpo_dist.generation.pairs.prompts import as_asked
from dpo_dist.generation.pairs.rounds import check_rounds
from dpo_dist.generation.pairs.start import responding_models
from dpo_dist.generation.sampling.respond import (
    Responder,
    find_description,
    open_responder,
    usable_prompt,
)

_FIRST_RECORDS = 64
_READ_RECORDS = 1024

Fault = Callable[[PreferenceRecord], str | None]
"""Returns the reason why a record cannot be used, or None."""


def rehearse_pairs(config: RunConfig) -> str:
    """Load what `pairs` loads before weights, ask the judge, and read the first records of each source.

    Returns:
        The findings, as lines for the screen.

    Raises:
        ConfigError: a model, its tokenizer, the judge or a folder cannot be used.
        DataError: a source cannot be read, or none of its first records can be used.
    """
    pairs, folder = config.pairs, RunFolder.of(config)
    file = folder.round(1).pairs_file if pairs.rounds else RunFolder.of(config).pairs_file
    if pairs.rounds:
        check_rounds(config)
    folder.check_writable()
    lines = [("pairs", f"{pairs.method}, {file}{' (exists)' if file.exists() else ''}")]
    faults: dict[str, Fault] = {}
    match pairs.method:
        case PairsMethod.scores:
            faults[""] = lambda record: None if record.scores else "without_scores"
        case PairsMethod.people:
            faults[""] = lambda record: None if len(record.responses) > 1 else "one_response"
        case PairsMethod.samples | PairsMethod.delta:
            for name in responding_models(config):
                responder = open_responder(find_description(name, config), config)
                lines.append(("model", describe_responder(responder)))
                faults[f"{name}: "] = fault_of(responder, config.data, pairs.max_new_tokens)
    if pairs.method is PairsMethod.samples:
        lines.append(("judge", ask_judge(config)))
    read = read_prompts if pairs.method in (PairsMethod.samples, PairsMethod.delta) else read_records
    for index, source in enumerate(config.data.train):
        lines += [
            (
                f"data.train[{index}]",
                whose + first_records(read(pinned(source, None)), source, config.data, fault),
            )
            for whose, fault in faults.items()
        ]
    findings = "".join(f"  {label + ':':<15}{text}\n" for label, text in lines)
    return f"check passed: everything that needs no weights and no GPU is in order\n{findings}"


def describe_responder(responder: Responder) -> str:
    """Return folder, vocabulary and stop tokens of a model as one line."""
    ends = responder.tokenizer.convert_ids_to_tokens(sorted(responder.stop_ids))
    folder = responder.source.adapter or responder.source.folder
    return f"{folder}, {len(responder.tokenizer):,} tokens, a response ends with {' or '.join(ends)}"


def fault_of(responder: Responder, data: DataConfig, new_tokens: int) -> Fault:
    """Return a function that returns why a model cannot be asked a prompt, or None."""

    def fault(record: PreferenceRecord) -> str | None:
        prompt = usable_prompt(as_asked(record, data), responder, new_tokens)
        return prompt if isinstance(prompt, str) else None

    return fault


def ask_judge(config: RunConfig) -> str:
    """Check the judge without its weights; ask an endpoint once. Return its description."""
    pairs = config.pairs
    if pairs.reward_model is not None:
        return check_reward_model(pairs.reward_model, config.model)
    if pairs.function is not None:  # found by `check_pairs`
        return f"function {pairs.function}"
    EndpointJudge(pairs.endpoint, retries=0).check()
    return f"{pairs.endpoint.model} at {pairs.endpoint.url} replies"


def first_records(
    records: Iterable[PreferenceRecord | BadRecord], source: SourceConfig, data: DataConfig, fault: Fault
) -> str:
    """Check the first records of a source; return their counts as one line."""
    path = source.path
    first = list(islice(records, _READ_RECORDS + 1))
    read = iter(first[:_READ_RECORDS])
    list(good_records(read, source, data, lambda _: None, of_first=len(first) > _READ_RECORDS))
    faults = [
        record.reason if isinstance(record, BadRecord) else fault(record) for record in first[:_FIRST_RECORDS]
    ]
    usable = faults.count(None)
    dropped = in_one_line(Counter(reason for reason in faults if reason is not None))
    if not usable:
        raise DataError(
            "none of the first records can be used",
            where=path,
            got=dropped or "no records",
            remedy="correct the records, or the keys of data; docs/data.md explains the reasons",
        )
    rest = " (the others were not looked at)" if len(first) > len(faults) else ""
    found = f"{path}, {usable} of the first {len(faults)} records can be used{rest}"
    return found + (f"; not used: {dropped}" if dropped else "")
