"""Encode the data of a run where no GPU waits for it: `dpo-dist encode +experiment=qwen7b encode.part=3/8`.

Takes the configuration of the training run, which then finds its data in `data.cache`. Needs no weights and
no GPU. Each job of an array encodes its part of all sources; with `data.drop_eval_prompts` it encodes the
whole evaluation data, which decide what is training data. Finished parts are used again.
"""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from dpo_dist.config.command_line import run_verb
from dpo_dist.config.rule import Rule, check_rules
from dpo_dist.config.rules import check_needs
from dpo_dist.config.schema import RunConfig, SourceConfig
from dpo_dist.data.formats import check_source
from dpo_dist.data.records import Part, eval_part, train_part
from dpo_dist.data.text.template import check_template_file
from dpo_dist.foundation.console import console_on
from dpo_dist.foundation.errors import ExitCode

if TYPE_CHECKING:
    from dpo_dist.data.encoded.build import Preparation
    from dpo_dist.data.encoded.store import EncodedSource

_JOIN_SECONDS = 2.0


def _share(config: RunConfig) -> tuple[int, int]:
    """Return the index of this job's part, from 0, and the number of parts."""
    number, parts = map(int, config.encode.part.split("/"))
    return number - 1, parts


_RULES = (
    Rule(
        "encode.part",
        "there is no such part",
        "set encode.part to I/N with I from 1 to N",
        lambda c: _share(c)[0] >= _share(c)[1],
    ),
)


def main(config: RunConfig) -> int:
    """Encode the data of `config`, or a part of them; return the exit code."""
    check_needs(config, "encode")
    check_rules(config, _RULES)
    data = config.data
    for source in [*data.train, *data.eval]:
        check_source(source, data)
    check_template_file(data.chat_template)
    # Imported late, so that the errors above appear at once.
    from dpo_dist.data.encoded.build import Preparation, tokenizer_digest  # noqa: PLC0415
    from dpo_dist.data.encoded.dataset import open_dataset  # noqa: PLC0415
    from dpo_dist.data.images import image_processor  # noqa: PLC0415
    from dpo_dist.model.files.folder import description_folder, start_folder, tokenizer_folder  # noqa: PLC0415
    from dpo_dist.model.files.load import load_tokenizer  # noqa: PLC0415

    model, console = config.model, console_on(sys.stderr, config.console.style)
    folder = description_folder(model.path, model.revision, needs_weights=False)
    files = tokenizer_folder(folder, start_folder(model))
    tokenizer, digest = load_tokenizer(files, model), tokenizer_digest(files)
    processor = image_processor(folder, tokenizer, model.images)

    def preparation(name: str, sources: Sequence[SourceConfig], part: Part) -> "Preparation":
        def progress(source: str) -> AbstractContextManager[Callable[..., None]]:
            return console.progress(f"encoding the {name} data: {source}", "record")

        return Preparation(sources, data, tokenizer, digest, progress, part, processor)

    share, prompts, made = _share(config), None, list["tuple[EncodedSource, ...] | None"]()
    if data.eval_sources:
        evaluation = preparation("eval", data.eval_sources, eval_part(data))
        if data.drop_eval_prompts:
            encoded = _whole(evaluation)
            prompts = open_dataset(encoded, data, processor).prompt_hashes[:]
        else:
            planned = evaluation.plan()
            made.append(evaluation.join(planned, evaluation.encode(planned, share)))
    train = preparation("train", data.train, train_part(data, prompts))
    planned = train.plan()
    made.append(train.join(planned, train.encode(planned, share)))
    for joined in filter(None, made):
        open_dataset(joined, data, processor)  # as training would: checks the counts, and writes the columns
    where = f"in {data.cache}"
    if None in made:
        console.say(f"part {config.encode.part} is encoded {where}; the job that ends last joins all parts")
    else:
        console.say(f"all data are encoded {where}")
    return ExitCode.completed


def _whole(preparation: "Preparation") -> "tuple[EncodedSource, ...]":
    """Return the sources of a preparation, of which other jobs may encode or join the same parts."""
    while True:
        planned = preparation.plan()
        if (encoded := preparation.join(planned, preparation.encode(planned))) is not None:
            return encoded
        time.sleep(_JOIN_SECONDS)  # another job joins the parts


if __name__ == "__main__":
    run_verb(main, verb="encode")
