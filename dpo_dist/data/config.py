"""The keys of preference data: sources, and the limits within which their records are encoded."""

from dataclasses import replace
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.fields import EVERY_READER, NonEmpty, Place, as_entry, key, schema

Ranked = StrEnum("Ranked", ["whole", "best_worst", "all_pairs"])
Truncation = StrEnum("Truncation", ["keep_start", "keep_end", "both", "drop"])

TEMPLATE_DATE = "2024-07-26"
"""The date that chat templates get as today's."""
Untrained = Literal["empty_thoughts", "thoughts", "formatting"]


@schema
class SourceConfig:
    """One entry of `data.train`, `data.eval` or `evaluation.data`; a bare string is its `path`."""

    path: Place = key(...)
    """File or pattern, also at a URL such as s3://bucket/data/*.jsonl; folder; hub name."""
    split: str | None = key(None)
    """Split of a hub dataset or of a folder with several; null: `train`."""
    name: str | None = key(None)
    """Configuration (subset) of a hub dataset; for a folder, an entry of its dataset_info.json."""
    data_dir: str | None = key(None)
    """Folder inside a hub dataset."""
    revision: str | None = key(None)
    """Branch, tag or commit of a hub dataset."""
    weight: float = key(1.0, gt=0, le=10**6, verbs="train precompute")
    """Draws of each pair in an epoch: 2 is twice, 0.5 a seeded half."""
    limit: int | None = key(None, ge=1)
    """Read only this many records, from the first; null: all."""
    fields: dict[str, Any] | str | None = key(
        None, accepts="a mapping, {prompt: question, chosen: answers.good}, or the name of a known shape"
    )
    """An expression for each field, or a shape's name; null: the known shape with these columns."""
    ignore: list[str] | None = key(None)
    """Columns that are not read, keys of messages as `[].KEY`, `*` for all others; null: none."""
    reader: str | None = key(None, runs="Python code of a reader of data is run")
    """Your own function, `module:function`, which turns a record into one of a known shape."""
    images: NonEmpty | None = key(None, free=True)
    """Folder of image files; null: that of the records."""
    label: str | None = key(None, free=True, accepts="letters, digits and . _ + -", pattern=r"^[\w.+-]+$")
    """Name of the source in metrics and counts; null: from its path."""


Source = Annotated[
    SourceConfig, BeforeValidator(as_entry("path"), json_schema_input_type=SourceConfig | NonEmpty)
]


@schema
class DataConfig:
    """Preference data, and the limits within which they are encoded."""

    for_scores: ClassVar[bool] = False
    """Whether a reward model scores each conversation as the template writes it, to its very end."""
    takes_apart: ClassVar[bool] = False
    """Whether a pair or a ranking is a good and a bad response, each alone."""

    train: list[Source] = key([], verbs=EVERY_READER)
    """Training data: files, patterns, folders, URLs, hub datasets."""
    eval: list[Source] = key([])
    """Evaluation data: files, patterns, folders, URLs, hub datasets."""
    eval_share: float = key(0.0, ge=0, lt=1)
    """Share of the prompts of `train` reserved as evaluation data; 0: none."""
    drop_eval_prompts: bool = key(False)
    """Keep records whose prompt is in `eval` out of the training data."""
    max_length: int = key(1024, ge=2, verbs=EVERY_READER)
    """Largest number of tokens of prompt and response together."""
    max_prompt_length: int | None = key(None, ge=1, verbs=EVERY_READER)
    """Largest number of tokens of a prompt, whose start is cut; null: no limit."""
    max_scorer_length: int | None = key(None, ge=2, verbs=EVERY_READER)
    """Largest number of tokens of a scorer's own prompt and a response; null: `max_length`."""
    truncation: Truncation = key(Truncation.keep_start)
    """Above `max_length`: `keep_start` cuts responses, `keep_end` the prompt's start, `both` in proportion,
    `drop` drops the pair."""
    max_bad_share: float = key(0.05, ge=0, le=1, verbs=EVERY_READER)
    """Largest share of records that may be dropped; more is an error, 0: each bad record."""
    text_as_messages: Literal["auto"] | bool = key("auto", verbs=EVERY_READER)
    """Render plain text by the chat template, as a user's turn; `auto`: if the tokenizer has one."""
    chat_template: NonEmpty | None = key(None, verbs=EVERY_READER)
    """A file with a template; null: the tokenizer's own."""
    template_arguments: dict[str, Any] | None = key(None, verbs=EVERY_READER, accepts="a mapping")
    """Arguments of the chat template for all records, such as `{enable_thinking: false}`; null: none."""
    untrained: list[Untrained] = key(["empty_thoughts"])
    """Parts of turns without loss: `empty_thoughts`, `thoughts`, `formatting` (the tokens around turns)."""
    ranked: Ranked = key(Ranked.whole)
    """A ranking of more than two is one example, its best and worst, or all pairs."""
    cache: NonEmpty = key("${run.root}/encoded", free=True)
    """Folder of encoded data, shared by runs."""

    @property
    def eval_sources(self) -> list[SourceConfig]:
        """The sources of the evaluation data; empty if there are none."""
        return list(self.eval) or (list(self.train) if self.eval_share else [])

    def check_has_evaluation_data(self) -> None:
        """Raise ConfigError if no source has evaluation data."""
        if not self.eval_sources:
            raise ConfigError(
                "there is no evaluation data",
                where="data.eval",
                got="no source",
                expected="held-out records",
                remedy="set 'data.eval=[held_out.jsonl]', or data.train and data.eval_share as in training",
            )

    def without_limits(self) -> "DataConfig":
        """Return the configuration with room for records of any length."""
        unlimited = 2**30
        return replace(
            self,
            max_length=unlimited,
            max_scorer_length=unlimited,
            max_prompt_length=None,
            truncation=Truncation.drop,
        )

    @property
    def longest(self) -> int:
        """The most tokens of an encoded prompt, the policy's or a scorer's own, with its response."""
        return max(self.max_length, self.max_scorer_length or 0)

    @property
    def encoding_identity(self) -> dict[str, Any]:
        """What decides, beside a record and the chat template, the token ids and masks of the record."""
        return {
            **{name: getattr(self, name) for name in _ENCODING_KEYS},
            "takes_apart": self.takes_apart,
            "template_date": TEMPLATE_DATE,
            "untrained": sorted(set(self.untrained)),
        }


class ScoredDataConfig(DataConfig):
    """The same keys for a reward model: behind each response is one more position, that of its score."""

    for_scores = True

    @property
    def longest(self) -> int:
        """The most tokens of an encoded prompt with its response, and the position of the score."""
        return self.max_length + 1

    @property
    def encoding_identity(self) -> dict[str, Any]:
        """What decides, beside a record and the chat template, the token ids and masks of the record."""
        return {**super().encoding_identity, "for_scores": True}


class UnpairedDataConfig(DataConfig):
    """The same keys for a loss of single responses, which are good or bad."""

    takes_apart = True


_ENCODING_KEYS = (
    "max_length",
    "max_prompt_length",
    "max_scorer_length",
    "truncation",
    "text_as_messages",
    "template_arguments",
    "ranked",
)
