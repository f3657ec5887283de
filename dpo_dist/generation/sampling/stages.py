"""Stages of work with whole models on every process: finished part by part, resumable."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dpo_dist.config.schema import TEMPLATE_DATE, DataConfig, Offload, ParallelismKind, RunConfig
from dpo_dist.data.records import PreferenceRecord, turns_of
from dpo_dist.distributed.memory import explain_out_of_memory
from dpo_dist.distributed.world import World
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.files import collect_abandoned, content_digest, staged_file, text_digest
from dpo_dist.generation.judges import Judge, open_judge
from dpo_dist.generation.pairs.files import prompt_key, write_lines
from dpo_dist.generation.sampling.generate import Sampling
from dpo_dist.generation.sampling.respond import KEY, Generate, ModelSource, Responder, find_model, respond
from dpo_dist.training.context import join

_FAILED = "failed"


@dataclass(frozen=True)
class Parts:
    """The parts of a stage, in a folder named by the digest of everything that they depend on."""

    folder: Path
    count: int

    def file(self, index: int) -> Path:
        """Return the file of a part, which exists if the part is finished."""
        return self.folder / f"{index:06d}.jsonl"

    def open(self) -> list[int]:
        """Return the indices of unfinished parts; create the folder, remove files of dead writers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        collect_abandoned(self.folder)
        (self.folder / _FAILED).unlink(missing_ok=True)
        return [index for index in range(self.count) if not self.file(index).is_file()]

    def write(self, index: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write a finished part."""
        with staged_file(self.file(index)) as temporary:
            write_lines(temporary, rows)

    def read(self, index: int) -> list[dict[str, Any]]:
        """Return the rows of a finished part."""
        return [json.loads(line) for line in self.file(index).read_text(encoding="utf-8").splitlines()]


@dataclass(frozen=True)
class Prompts:
    """Different prompts in parts, which processes share; stages have folders below `root`."""

    root: Path
    parts: list[list[PreferenceRecord]]

    @classmethod
    def of(cls, root: Path, records: Sequence[PreferenceRecord], size: int) -> "Prompts":
        """Return the prompts in parts of `size`."""
        return cls(root, [list(records[start : start + size]) for start in range(0, len(records), size)])

    @cached_property
    def digest(self) -> str:
        """The digest of all parts."""
        return text_digest(json.dumps([list(map(prompt_key, part)) for part in self.parts]))

    def stage(self, name: str, settings: Mapping[str, Any]) -> Parts:
        """Return the parts of a stage; other prompts or settings have another folder."""
        digest = text_digest(json.dumps([self.digest, settings], sort_keys=True))[:16]
        return Parts(self.root / f"{name}-{digest}", len(self.parts))


def as_asked(record: PreferenceRecord, data: DataConfig) -> PreferenceRecord:
    """Return a prompt as models are asked: a text as a user's message if `data.text_as_messages` is set."""
    return replace(record, prompt=turns_of(record.prompt, "user")) if data.text_as_messages else record


def generation_settings(config: RunConfig, sampling: Sampling) -> dict[str, Any]:
    """Return what responses depend on but prompt and model; a chat template in a file by its content."""
    data, model = config.data, config.model
    chat_template = data.chat_template
    if chat_template is not None and (file := Path(chat_template).expanduser()).is_file():
        chat_template = content_digest([file])
    return {
        "max_length": data.max_length,
        "max_prompt_length": data.max_prompt_length,
        "text_as_messages": data.text_as_messages,
        "template": str(data.template),
        "template_date": TEMPLATE_DATE,
        "chat_template": chat_template,
        "template_arguments": data.template_arguments,
        **asdict(sampling),
        "dtype": str(model.dtype),
        "quantization": None if model.quantization is None else str(model.quantization),
    }


@dataclass(frozen=True)
class Stages:
    """The processes that finish stages together; `remedy` if memory runs out. Methods are collective."""

    world: World
    console: Console
    remedy: str

    def finish(self, title: str, parts: Parts, work: Callable[[int], list[dict[str, Any]]]) -> Parts:
        """Finish all parts of a stage, which the processes share, with the progress of one; return them."""
        world, flag = self.world, parts.folder / _FAILED
        with self.console.heartbeat(f"{title}: looking for parts"):
            unfinished = world.on_main(parts.open)

        own = unfinished[world.rank :: world.size]

        def my_parts() -> None:
            try:
                for done, index in enumerate(own, start=1):
                    if flag.exists():
                        return
                    with explain_out_of_memory(title, self.remedy):
                        parts.write(index, work(index))
                    show(done, len(own))
            except BaseException:
                with contextlib.suppress(OSError):
                    flag.touch()
                raise

        with self.console.progress(title, "part") as show:
            show(0, len(own))
            world.together(my_parts)
        return parts

    def responses(
        self,
        source: ModelSource,
        prompts: Prompts,
        config: RunConfig,
        sampling: Sampling,
        numbers: range,
        opened: Callable[[], tuple[Responder, Generate]],
    ) -> Parts:
        """Return a model's finished responses to prompts; `opened` is called by a process with work to do."""

        def part(index: int) -> list[dict[str, Any]]:
            return list(map(asdict, respond(prompts.parts[index], *opened(), sampling, numbers)))

        own = {"model": source.digest, "numbers": [numbers.start, len(numbers)]}
        settings = generation_settings(config, sampling) | own
        return self.finish(f"responses of {source.name}", prompts.stage("responses", settings), part)

    def judge(self, config: RunConfig) -> tuple[Judge | None, dict[str, Any] | None]:
        """Return the judge on every rank and what it is, if there is one."""
        judge = self.world.together(lambda: open_judge(config, self.world.device))
        with self.console.heartbeat("looking for the judge"):
            return judge, None if judge is None else self.world.on_main(judge.describe)

    def found(self, name: str, config: RunConfig, key: str = KEY) -> ModelSource:
        """Return the files of a model on every rank; rank 0 downloads first."""
        with self.console.heartbeat(f"reading the files of {name} to identify it"):
            self.world.on_main(lambda: find_model(name, config, key))
            return self.world.together(lambda: find_model(name, config, key))


@contextmanager
def joined_stages(
    config: RunConfig, console: Console, remedy: str, only: AbstractContextManager[Any]
) -> Iterator[Stages]:
    """Join the processes, each of which loads whole models; rank 0 enters `only`, a lock."""
    whole = replace(
        config.parallelism,
        kind=ParallelismKind.ddp,
        offload_parameters=Offload.none,
        offload_optimizer=Offload.none,
    )
    with ExitStack() as held, join(replace(config, parallelism=whole), console) as world:
        world.on_main(lambda: held.enter_context(only))
        yield Stages(world, console, remedy)
