"""`--check` of `pairs`: load and check everything that needs no weights and no GPU; writes nothing."""

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

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
from dpo_dist.generation.judges import ask_judge
from dpo_dist.generation.pairs.files import good_records
from dpo_dist.generation.pairs.prompts import as_asked
from dpo_dist.generation.pairs.rounds import check_rounds
from dpo_dist.generation.pairs.start import responding_models
from dpo_dist.generation.sampling.respond import Responder, find_description, open_responder, usable_prompt

_FIRST_RECORDS = 64
_READ_RECORDS = 1024

Fault = Callable[[PreferenceRecord], str | None]
"""Returns the reason why a record cannot be used, or None."""


def rehearse_pairs(config: RunConfig) -> str:
    """Load what `pairs` loads before weights, ask the judge, and read the first records of each source.

    Returns lines for the screen; raises DpoDistError for what cannot be used.
    """
    pairs, folder = config.pairs, RunFolder.of(config)
    if pairs.rounds:
        check_rounds(config)
    folder.check_writable()
    file = (folder.round(1) if pairs.rounds else folder).pairs_file
    lines = [("pairs", f"{pairs.method}, {file}{' (exists)' if file.exists() else ''}")]
    faults: dict[str, Fault] = {}
    read: Any = read_records
    if pairs.method is PairsMethod.scores:
        faults[""] = lambda record: None if record.scores else "without_scores"
    elif pairs.method is PairsMethod.people:
        faults[""] = lambda record: None if len(record.responses) > 1 else "one_response"
    else:
        read = read_prompts
        for name in responding_models(config):
            responder = open_responder(find_description(name, config), config)
            lines.append(("model", describe_responder(responder)))
            faults[f"{name}: "] = fault_of(responder, config.data, pairs.max_new_tokens)
    if pairs.method is PairsMethod.samples:
        lines.append(("judge", ask_judge(config)))
    for index, source in enumerate(config.data.train):
        for whose, fault in faults.items():
            found = first_records(read(pinned(source, None)), source, config.data, fault)
            lines.append((f"data.train[{index}]", whose + found))
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


def first_records(
    records: Iterable[PreferenceRecord | BadRecord], source: SourceConfig, data: DataConfig, fault: Fault
) -> str:
    """Check the first records of a source; return their counts as one line."""
    read = list(islice(records, _READ_RECORDS + 1))
    is_more = len(read) > _READ_RECORDS
    list(good_records(iter(read[:_READ_RECORDS]), source, data, lambda _: None, of_first=is_more))
    first = read[:_FIRST_RECORDS]
    faults = [record.reason if isinstance(record, BadRecord) else fault(record) for record in first]
    dropped = in_one_line(Counter(reason for reason in faults if reason is not None))
    usable = faults.count(None)
    if not usable:
        raise DataError(
            "none of the first records can be used",
            where=source.path,
            got=dropped or "no records",
            remedy="correct the records, or the keys of data; docs/data.md explains the reasons",
        )
    rest = " (the others were not looked at)" if len(read) > len(first) else ""
    found = f"{source.path}, {usable} of the first {len(first)} records can be used{rest}"
    return found + (f"; not used: {dropped}" if dropped else "")
