"""Examine preference data: stream all sources, compare their records, and return the doctor's report."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_dist.config.data import DataConfig, SourceConfig
from dpo_dist.config.schema import NO_MODEL, RunConfig
from dpo_dist.config.verb_options import FailOn
from dpo_dist.data.build import Progress, changed_data, no_progress, share_read, source_state
from dpo_dist.data.columns import resolved
from dpo_dist.data.encode import CHUNK_RECORDS, in_order
from dpo_dist.data.formats import read_records
from dpo_dist.data.read import Meter
from dpo_dist.data.records import BadRecord, PreferenceRecord
from dpo_dist.data.sources import pinned, source_labels
from dpo_dist.data.template import chosen_template
from dpo_dist.foundation.errors import DpoDistError
from dpo_dist.insight.doctor.benchmarks import Benchmark
from dpo_dist.insight.doctor.duplicates import Comparison
from dpo_dist.insight.doctor.findings import Finding, Level, most_serious_first
from dpo_dist.insight.doctor.margins import compare_with_store
from dpo_dist.insight.doctor.observe import Observer
from dpo_dist.insight.doctor.prepare import prepare
from dpo_dist.insight.doctor.rules import Rules, with_thresholds
from dpo_dist.insight.doctor.shown_pairs import ShownPair, show_pairs
from dpo_dist.insight.doctor.sources import Source
from dpo_dist.model.adapter_files import start_folder, tokenizer_folder
from dpo_dist.model.folder import description_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CounterOf = Callable[[str, str], AbstractContextManager[Callable[..., None]]]
"""From a title and a unit to a context with a progress function: `Console.counter` of the report."""

SHOWN_PAIRS = 4  # of each source, besides examples of findings
# These rules already say that training would refuse the data.
_REFUSING_RULES = {"no_records", "too_many_dropped"}


@dataclass(frozen=True)
class Diagnosis:
    """Everything that the doctor found.

    Attributes:
        sources: by source of `data.train`, then of `data.eval`; as in doctor.json, as is `across`.
        findings: the most serious first.
        model: folder of the tokenizer; None: data were examined as text.
        store: use of the reference store; None without a model.
        shown: records for the page.
    """

    sources: Sequence[dict[str, Any]]
    across: Mapping[str, Any]
    findings: Sequence[Finding]
    model: Path | None = None
    store: dict[str, Any] | None = None
    shown: Sequence[ShownPair] = ()

    def fails(self, lowest: FailOn) -> bool:
        """Return whether there is a finding of at least this level."""
        failing = {FailOn.error: (Level.error,), FailOn.warning: (Level.error, Level.warning)}
        return any(finding.level in failing.get(lowest, ()) for finding in self.findings)


def diagnose(config: RunConfig, counter: CounterOf, benchmark: Benchmark | None = None) -> Diagnosis:
    """Encode and examine the data of a run; nothing is trained, and no weights are loaded.

    Raises:
        ConfigError: the policy's tokenizer cannot be used, or a threshold names no rule.
        DataError: a source cannot be read, or changes meanwhile.
    """
    data, rules = config.data, with_thresholds(config.doctor.thresholds)
    sources = [resolved(source) for source in (*data.train, *data.eval)]
    states = list(map(source_state, sources))
    tokenizer, files, prepared = None, None, None
    if config.model.path != NO_MODEL:
        from dpo_dist.model.load import load_config, load_tokenizer  # noqa: PLC0415  (slow)

        folder = description_folder(config.model.path, config.model.revision, needs_weights=False)
        files = tokenizer_folder(folder, start_folder(config.model))
        tokenizer = load_tokenizer(files, config.model)
        vocab_size = load_config(folder, config.model).get_text_config().vocab_size
        prepared = prepare(
            config, tokenizer, files, vocab_size, lambda source: counter(f"encoding {source}", "record")
        )
    found = examine(
        data, tokenizer, rules, benchmark, lambda source: counter(f"examining {source}", "record")
    )
    if prepared is not None:
        datasets, refusals = prepared
        store, mislabelled = compare_with_store(config, found.sources, datasets, rules)
        findings = [*_refused(refusals, found.findings), *mislabelled, *found.findings]
        found = replace(found, findings=most_serious_first(findings), model=files, store=store)
    if config.doctor.texts:
        found = replace(found, shown=show_pairs(data, tokenizer, found.findings, SHOWN_PAIRS))
    for source, state in zip(sources, states, strict=True):
        if source_state(source) != state:
            raise changed_data(source)
    return found


def examine(
    config: DataConfig,
    tokenizer: "PreTrainedTokenizerBase | None",
    rules: Rules,
    benchmark: Benchmark | None = None,
    progress: Progress = no_progress,
) -> Diagnosis:
    """Read `config.train` and `config.eval` once, as a stream, and check them.

    Without a tokenizer nothing is counted in tokens. The result does not depend on the number of processes.

    Raises:
        DataError: a source cannot be read.
        ConfigError: encoding is impossible with this tokenizer.
        PeerLostError: a process that encodes has died.
    """
    observer, is_split = Observer(config, tokenizer, benchmark), config.eval_share > 0
    sources: list[Source] = []
    findings: list[Finding] = []
    for source, label, is_eval in _labelled(config):
        found = Source(
            label, source.path, is_eval=is_eval, is_split=is_split, is_encoded=tokenizer is not None
        )
        meter = Meter()
        chunks = _chunks(read_records(pinned(source, Path(config.cache)), meter))
        with (
            progress(label) as count,
            closing(in_order(chunks, observer.observe, config.processes)) as observed,
        ):
            for chunk in observed:
                found.add(chunk)
                count(len(chunk), share_read(meter, source.limit, found.read))
        sources.append(found)
        findings += found.findings(rules, config.max_bad_share)
        if tokenizer is not None:
            findings += _tools_not_rendered(found, tokenizer, config, rules)
    across, compared = Comparison(
        sources, rules, is_split=is_split, drops_eval_prompts=config.drop_eval_prompts
    ).result()
    return Diagnosis(
        [source.report() for source in sources], across, most_serious_first([*findings, *compared])
    )


def _chunks(records: Iterator[PreferenceRecord | BadRecord]) -> Iterator[list[PreferenceRecord | BadRecord]]:
    while chunk := list(islice(records, CHUNK_RECORDS)):
        yield chunk


def _tools_not_rendered(
    source: Source, tokenizer: "PreTrainedTokenizerBase", config: DataConfig, rules: Rules
) -> Iterator[Finding]:
    origins = source.named.get("tools", [])
    template = chosen_template(tokenizer, config.chat_template, with_tools=bool(origins))
    if template is not None and not re.search(r"\btools\b", template):
        rule = rules["tools_not_rendered"]
        yield from rule.count(len(origins), len(source.keys), source.label, origins)


def _labelled(config: DataConfig) -> Iterator[tuple[SourceConfig, str, bool]]:
    """Yield each source with its label in metrics; a label that occurs again is made different."""
    seen: Counter[str] = Counter()
    for is_eval, sources in ((False, config.train), (True, config.eval)):
        labels = source_labels(sources)
        again = {label for label in labels if is_eval and seen[label]}
        for source, label in zip(sources, labels, strict=True):
            distinct = f"{label} (eval)" if label in again else label
            seen[distinct] += 1
            yield source, distinct if seen[distinct] == 1 else f"{distinct} ({seen[distinct]})", is_eval


def _refused(refusals: Sequence[DpoDistError], findings: Sequence[Finding]) -> Iterator[Finding]:
    """Yield a finding for each error of training that no other finding mentions."""
    if _REFUSING_RULES & {finding.rule for finding in findings}:
        return
    for refusal in refusals:
        text = f"training would stop: {refusal.message}" + (f" ({refusal.got})" if refusal.got else "")
        examples = tuple(refusal.where.split("; "))
        yield Finding("training_refuses", Level.error, text, examples=examples, remedy=refusal.remedy)
