"""`--check` of `pairs`: load and check everything that needs no weights and no GPU; writes nothing."""

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import islice

from dpo_dist.config.data import DataConfig, SourceConfig
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import PairsMethod, RunConfig
from dpo_dist.data.counts import in_one_line
from dpo_dist.data.formats import read_prompts, read_records
from dpo_dist.data.records import BadRecord, PreferenceRecord
from dpo_dist.data.sources import pinned
from dpo_dist.foundation.errors import DataError
from dpo_dist.generation.judges import open_judge
from dpo_dist.generation.pairs.files import Read, good_records
from dpo_dist.generation.pairs.prompts import as_asked
from dpo_dist.generation.pairs.rounds import check_rounds
from dpo_dist.generation.pairs.start import responding_models
from dpo_dist.generation.sampling.respond import KEY, find_model, open_responder, usable_prompt

_FIRST_RECORDS = 64
_READ_RECORDS = 1024

Fault = Callable[[PreferenceRecord], str | None]
"""Returns the reason why a record cannot be used, or None."""


Lines = list[tuple[str, str]]
"""Findings, each with its label."""


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
    read: Read = read_records
    if pairs.method is PairsMethod.scores:
        faults[""] = lambda record: None if record.scores else "without_scores"
    elif pairs.method is PairsMethod.people:
        faults[""] = lambda record: None if len(record.responses) > 1 else "one_response"
    else:
        read = read_prompts
        for name in responding_models(config):
            faults[f"{name}: "] = check_model(name, config, pairs.max_new_tokens, lines)
    if pairs.method is PairsMethod.samples and (judge := open_judge(config)) is not None:
        lines.append(("judge", judge.check()))
    for index, source in enumerate(config.data.train):
        lines += first_records(f"data.train[{index}]", read, source, config.data, faults)
    return passed(lines)


def passed(lines: Lines) -> str:
    """Return the text of a check without a mistake."""
    findings = "".join(f"  {label + ':':<15}{text}\n" for label, text in lines)
    return f"check passed: everything that needs no weights and no GPU is in order\n{findings}"


def check_model(
    model: str, config: RunConfig, new_tokens: int, lines: Lines, name: str = "", key: str = KEY
) -> Fault:
    """Check a model without its weights; return a function that returns why it cannot be asked a prompt."""
    responder = open_responder(find_model(model, config, key, is_check=True), config, key)
    ends = responder.tokenizer.convert_ids_to_tokens(sorted(responder.stop_ids))
    folder = responder.source.adapter or responder.source.folder
    found = f"{folder}, {len(responder.tokenizer):,} tokens, a response ends with {' or '.join(ends)}"
    lines.append(("model", name + found))

    def fault(record: PreferenceRecord) -> str | None:
        prompt = usable_prompt(as_asked(record, config.data), responder, new_tokens)
        return prompt if isinstance(prompt, str) else None

    return fault


def first_records(
    label: str, read: Read, source: SourceConfig, data: DataConfig, faults: Mapping[str, Fault]
) -> Lines:
    """Check the first records of a source; return the number that each model, or the verb, can use."""
    found = list(islice(read(pinned(source, None)), _READ_RECORDS + 1))
    is_more = len(found) > _READ_RECORDS
    list(good_records(iter(found[:_READ_RECORDS]), source, data, lambda _: None, of_first=is_more))
    first, lines = found[:_FIRST_RECORDS], []
    rest = " (the others were not looked at)" if len(found) > len(first) else ""
    for whose, fault in faults.items():
        reasons = [record.reason if isinstance(record, BadRecord) else fault(record) for record in first]
        dropped = in_one_line(Counter(reason for reason in reasons if reason is not None))
        usable = reasons.count(None)
        if not usable:
            raise DataError(
                "none of the first records can be used",
                where=source.path,
                got=dropped or "no records",
                remedy="correct the records, or the keys of data; docs/data.md explains the reasons",
            )
        text = f"{whose}{source.path}, {usable} of the first {len(first)} records can be used{rest}"
        lines.append((label, text + (f"; not used: {dropped}" if dropped else "")))
    return lines
