"""Encode the data of a run where no GPU waits for it: `dpo-dist encode +experiment=qwen7b encode.part=3/8`.

Takes the configuration of the training run, which then finds its data in `data.cache`. Needs no weights and
no GPU. Each job of an array encodes its part of all sources; with `data.drop_eval_prompts` it encodes the
whole evaluation data, which decide what is training data. Finished parts are used again.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

from dpo_dist.config.command_line import run_verb
from dpo_dist.config.rules import check_rules, needs_of
from dpo_dist.config.schema import RunConfig
from dpo_dist.data import ChatTemplate, DataSource, Part, SourceConfig
from dpo_dist.foundation.console import console_on
from dpo_dist.foundation.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from dpo_dist.encoded.store import EncodedSource


def _share(part: str) -> tuple[int, int]:
    """Return the index of this job's part, from 0, and the number of parts."""
    number, parts = map(int, part.split("/"))
    if number > parts:
        remedy = "set encode.part to I/N with I from 1 to N"
        raise ConfigError("there is no such part", where="encode.part", got=part, remedy=remedy)
    return number - 1, parts


def main(config: RunConfig) -> int:
    """Encode the data of `config`, or a part of them; return the exit code."""
    check_rules(config, needs_of("encode"))
    data = config.data
    share = _share(config.encode.part)
    for source in [*data.train, *data.eval]:
        DataSource(source).check(data)
    ChatTemplate.check_file(data.chat_template)
    # Imported late, so that the errors above appear at once.
    from dpo_dist.encoded.build import EVERY_PART, Preparation  # noqa: PLC0415
    from dpo_dist.encoded.dataset import open_dataset  # noqa: PLC0415
    from dpo_dist.model.files.folder import description_folder, start_folder  # noqa: PLC0415
    from dpo_dist.model.files.load import load_encoder  # noqa: PLC0415

    model = config.model
    console = console_on(sys.stderr, config.console.style)
    folder = description_folder(model.path, model.revision, needs_weights=False)
    encoder = load_encoder(folder, start_folder(model), model)
    tokenizer = encoder.tokenizer
    processor = encoder.processor

    def encode(
        name: str, sources: Sequence[SourceConfig], part: Part, share: tuple[int, int]
    ) -> "Callable[[], tuple[EncodedSource, ...] | None]":
        """Encode a share; return a function that returns the sources, or None while others encode theirs."""

        def progress(source: str) -> AbstractContextManager[Callable[..., None]]:
            return console.progress(f"encoding the {name} data: {source}", "record")

        preparation = Preparation(sources, data, tokenizer, encoder.digest, progress, part, processor)
        planned = preparation.plan()
        return partial(preparation.join, planned, preparation.encode(planned, share), share)

    joins = []
    prompts = None
    if data.eval_sources:
        needs_all = data.drop_eval_prompts
        join = encode("eval", data.eval_sources, Part.to_evaluate(data), EVERY_PART if needs_all else share)
        held_out = join() if needs_all else None
        if held_out is not None:
            prompts = open_dataset(held_out, data, processor).prompt_hashes[:]
        joins.append(join)
    joins.append(encode("train", data.train, Part.to_train(data, prompts), share))
    # All at the end: other jobs may have finished their parts of the evaluation data meanwhile.
    made = [join() for join in joins]
    for joined in filter(None, made):
        open_dataset(joined, data, processor)  # checks the counts, and writes the columns
    if None in made:
        console.say(
            f"part {config.encode.part} is encoded in {data.cache}; the job that ends last joins all parts"
        )
    else:
        console.say(f"all data are encoded in {data.cache}")
    return ExitCode.completed


if __name__ == "__main__":
    run_verb(main, verb="encode")
