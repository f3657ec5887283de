"""Work through prompts in parts that are saved one by one; every process loads whole models."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

from dpo_dist.data import (
    BadRecord,
    DataConfig,
    DataCounts,
    DataSource,
    PreferenceRecord,
    SourceConfig,
    turns_of,
)
from dpo_dist.data.config import TEMPLATE_DATE
from dpo_dist.foundation import files
from dpo_dist.foundation.text import pluralize
from dpo_dist.kit import (
    ModelConfig,
    ModelSource,
    Run,
    explain_out_of_memory,
    find_model,
    on_every_rank,
    unsharded_loading,
)
from dpo_dist.tools.sampling.judges import Judge, open_judge
from dpo_dist.tools.sampling.keys import PairsConfig, SamplingConfig
from dpo_dist.tools.sampling.respond import (
    Generate,
    Responder,
    open_responder,
    respond,
)
from dpo_dist.tools.sampling.served import Server, check_served, open_server, reload_server
from dpo_dist.tools.sampling.settings import Sampling

DROPPED_PROMPT_PREFIX = "prompts_dropped_"
"""Prefix of the counts of prompts that are left out; the reason follows."""
PROMPTS_OF_A_PART = 16
"""Processes share the parts, and finished parts are not repeated."""
_FAILED = "failed"


@dataclass(frozen=True)
class Parts:
    """The parts of a stage, in a folder named by the digest of everything that they depend on."""

    folder: Path
    count: int

    def file(self, index: int) -> Path:
        """Return the file of a part, which exists if the part is finished."""
        return self.folder / f"{index:06d}.jsonl"

    def unfinished(self) -> list[int]:
        """Return the indices of unfinished parts."""
        return [index for index in range(self.count) if not self.file(index).is_file()]

    def open(self) -> list[int]:
        """Create the folder, remove files of killed processes, and return indices of unfinished parts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files.remove_abandoned(self.folder)
        (self.folder / _FAILED).unlink(missing_ok=True)
        return self.unfinished()

    def read(self, index: int) -> list[dict[str, Any]]:
        """Return the rows of a finished part."""
        return list(files.read_lines(self.file(index)))


@dataclass(frozen=True)
class Prompts:
    """Different prompts in parts, which the processes of `run` share.

    Each stage of the work, such as responses or scores, has a folder below `root`. `finish` and `responses`
    are collective.
    """

    run: Run
    root: Path
    parts: Sequence[Sequence[PreferenceRecord]]

    @cached_property
    def digest(self) -> str:
        """The digest of all prompts in their parts."""
        return files.text_digest(
            json.dumps([[record.prompt_key() for record in part] for part in self.parts])
        )

    def stage(self, name: str, settings: Mapping[str, Any]) -> Parts:
        """Return the parts of a stage; their folder depends on the prompts and on `settings`."""
        digest = files.text_digest(json.dumps([self.digest, settings], sort_keys=True))[:16]
        return Parts(self.root / f"{name}-{digest}", len(self.parts))

    def finish(
        self,
        title: str,
        parts: Parts,
        work: Callable[[int], list[dict[str, Any]]],
    ) -> Parts:
        """Write the rows that `work` returns for each unfinished part of a stage; return the stage."""
        world = self.run.world
        console = self.run.console
        flag = parts.folder / _FAILED
        with console.heartbeat(f"{title}: looking for parts"):
            unfinished = world.on_main(parts.open)
        share = unfinished[world.rank :: world.size]
        remedy = "lower sampling.max_new_tokens; each process loads whole models onto its GPU"

        def my_parts() -> None:
            try:
                for done, index in enumerate(share, start=1):
                    if flag.exists():
                        return
                    with explain_out_of_memory(title, remedy):
                        rows = work(index)
                    with files.staged_file(parts.file(index)) as temporary:
                        files.write_lines(temporary, rows)
                    show(done, len(share))
            except BaseException:
                with contextlib.suppress(OSError):
                    flag.touch()
                raise

        with console.progress(title, "part") as show:
            show(0, len(share))
            world.together(my_parts)
        return parts

    def responses(
        self,
        source: ModelSource,
        sampling: Sampling,
        numbers: range,
        open_model: Callable[[], tuple[Responder, Generate]],
    ) -> Parts:
        """Return a model's finished responses; `open_model` is called only where parts are unfinished.

        With `sampling.endpoint` a server responds, which is checked first, and `open_model` is not called.
        """
        config = self.run.config
        settings = {
            **generation_settings(config.data, config.model, sampling),
            "model": source.digest,
            "numbers": [numbers.start, len(numbers)],
        }
        is_served = config.section_of(SamplingConfig).endpoint.url is not None
        if is_served:
            settings["server"] = True
        stage = self.stage("responses", settings)
        unfinished = self.run.world.on_main(stage.unfinished) if is_served else []
        server = self._served(source, self.parts[unfinished[0]]) if unfinished else None

        def part(index: int) -> list[dict[str, Any]]:
            responder, generate = open_model() if server is None else (server.responder, server.generate)
            records = self.parts[index]
            return list(map(asdict, respond(records, responder, generate, sampling, numbers)))

        return self.finish(f"responses of {source.name}", stage, part)

    def _served(self, source: ModelSource, records: Sequence[PreferenceRecord]) -> Server:
        """Return the server on every rank, checked by some of the prompts that it is asked; collective."""
        config = self.run.config
        world = self.run.world
        console = self.run.console
        endpoint = config.section_of(SamplingConfig).endpoint
        model = config.model
        responder = open_responder(source, model, config.data)

        def ready() -> None:
            if endpoint.reload is not None:
                reload_server(endpoint, source)
            check_served(open_server(endpoint, responder), records, model, world.device, console)

        with console.heartbeat(f"checking that the server serves {source.name}"), unsharded_loading(world):
            world.on_main(ready)
        return world.together(lambda: open_server(endpoint, responder))


def generation_settings(data: DataConfig, model: ModelConfig, sampling: Sampling) -> dict[str, Any]:
    """Return the settings on which responses depend; a chat template in a file counts by its content."""
    chat_template = data.chat_template
    if chat_template is not None:
        file = Path(chat_template).expanduser()
        if file.is_file():
            chat_template = files.content_digest([file])
    settings = {} if model.images is None else {"max_pixels": model.images.max_pixels}
    return {
        **settings,
        "max_length": data.max_length,
        "max_prompt_length": data.max_prompt_length,
        "text_as_messages": data.text_as_messages,
        "template_date": TEMPLATE_DATE,
        "chat_template": chat_template,
        "template_arguments": data.template_arguments,
        **asdict(sampling),
        "dtype": str(model.dtype),
        "quantization": model.quantization and str(model.quantization),
    }


def open_judge_together(run: Run) -> tuple[Judge | None, dict[str, Any] | None]:
    """Return the judge, checked, and its description on every rank, None twice without one; collective."""
    pairs = run.config.section_of(PairsConfig)
    model = run.config.model
    store = Path(run.config.reference.store)
    judge = run.world.together(lambda: open_judge(pairs, model, store, run.world.device))
    if judge is None:
        return None, None
    with run.console.heartbeat("looking for the judge"):
        run.world.on_main(judge.check)
        return judge, run.world.on_main(judge.describe)


def find_model_together(name: str, run: Run, key: str) -> ModelSource:
    """Return the files of a model on every rank; rank 0 downloads first. Collective."""
    find = partial(find_model, name, run.config.model, Path(run.config.reference.store), key)
    return on_every_rank(run, find, f"reading the files of {name} to identify it")


Read: TypeAlias = Callable[[DataSource], Iterator[PreferenceRecord | BadRecord]]
"""`DataSource.records` or `DataSource.prompts`."""


def good_records(
    records: Iterator[PreferenceRecord | BadRecord],
    source: SourceConfig,
    data: DataConfig,
    say: Callable[[str], None],
    enough: Callable[[], bool] = lambda: False,
) -> Iterator[PreferenceRecord]:
    """Yield the usable records of a source until `enough` returns true; then print the counts."""
    counts = DataCounts()
    while not enough():
        unread = next(records, None)
        if unread is None:
            break
        record = unread.readable()
        counts.add(record)
        if isinstance(record, PreferenceRecord):
            yield record
    counts.check(source.path, data)
    say(f"{source.path}: {counts.kept:,} of {pluralize(counts.read, 'record')} kept")
    for line in counts.dropped_lines():
        say(line)


def as_user_message(record: PreferenceRecord, data: DataConfig) -> PreferenceRecord:
    """Return the record with the prompt that models get: under `data.text_as_messages` a user's message."""
    is_turn = data.text_as_messages is True  # `auto`: each model's own template decides
    return replace(record, prompt=turns_of(record.prompt, "user")) if is_turn else record
