"""The keys of `data` and of its sources: type, default, bounds, meaning; see `schema`."""

from enum import StrEnum
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from dpo_dist.config.fields import VERBS_WITH_DATA, Filled, as_entry, key, schema

DataFormat = StrEnum("DataFormat", "auto hh text implicit_prompt messages ranked completion")
Ranked = StrEnum("Ranked", ["whole", "best_worst", "all_pairs"])
TextTemplate = StrEnum("TextTemplate", ["auto", "applied", "literal"])
Truncation = StrEnum("Truncation", ["keep_start", "keep_end", "drop"])
OnBadRecord = StrEnum("OnBadRecord", ["drop", "error"])
Role = Literal["assistant", "user", "tool", "system"]

TEMPLATE_DATE = "2024-07-26"
"""Today's date for chat templates with a clock."""
UNTRAINED_PARTS = ("empty_thoughts", "thoughts", "formatting")
MARKER_GAP = "..."
"""Between the begin and the end marker in an entry of `data.untrained`."""
Untrained = Annotated[str, Field(pattern=rf"^({'|'.join(UNTRAINED_PARTS)}|(?s:.*\S.*)\.\.\.(?s:.*\S.*))$")]


@schema
class SourceConfig:
    """One entry of `data.train` or `data.eval`; a bare string is its `path`."""

    path: Filled = key(...)
    """File, pattern, folder or hub name."""
    format: DataFormat = key(DataFormat.auto)
    """Format of the records; `auto`: detected for each record."""
    split: str | None = key(None)
    """Split of a hub dataset or of a folder with several; null: `train`."""
    name: str | None = key(None)
    """Configuration (subset) of a hub dataset; entry of the dataset_info.json in a folder."""
    data_dir: str | None = key(None)
    """Folder inside a hub dataset."""
    revision: str | None = key(None)
    """Branch, tag or commit of a hub dataset."""
    weight: float = key(1.0, gt=0, le=10**6, verbs="train precompute")
    """Occurrences of each pair per epoch: 2 is twice, 0.5 a seeded half of the pairs."""
    limit: int | None = key(None, ge=1)
    """Number of records to read, from the first; null: all."""
    columns: dict[str, str | None] | None = key(
        None, accepts="a mapping, {prompt: question, chosen: answers.good}"
    )
    """Column, or path into nested objects, of a field with another name; null: it is ignored."""
    reader: str | None = key(None)
    """Your own function, as `module:function`: from a record's fields to those of a format."""
    label: str | None = key(None, free=True, accepts="letters, digits and . _ + -", pattern=r"^[\w.+-]+$")
    """Name of the source in metrics and counts; null: a name from its path, unique in the list."""


Source = Annotated[SourceConfig, BeforeValidator(as_entry("path"))]

_EVALUATED = "train precompute evaluate compare doctor"


@schema
class DataConfig:
    """Preference data, and the limits within which they are encoded."""

    train: list[Source] = key([], verbs=VERBS_WITH_DATA)
    """Training data: files, patterns, folders, hub datasets."""
    eval: list[Source] = key([], verbs=_EVALUATED)
    """Evaluation data, in the same form."""
    eval_share: float = key(0.0, ge=0, lt=1, verbs=_EVALUATED)
    """Share of the prompts of `train` reserved as evaluation data, by a hash of the prompt; 0: none."""
    drop_eval_prompts: bool = key(False)
    """Keep records whose prompt is in `eval` out of the training data."""
    max_length: int = key(1024, ge=2, verbs=VERBS_WITH_DATA)
    """Largest number of tokens of prompt and response together."""
    max_prompt_length: int | None = key(None, ge=1, verbs=VERBS_WITH_DATA)
    """Largest number of tokens of a prompt; the start of a longer one is cut; null: no limit."""
    truncation: Truncation = key(Truncation.keep_start)
    """For pairs above `max_length`: `keep_start` cuts responses, `keep_end` the prompt's start, `drop`."""
    on_bad_record: OnBadRecord = key(OnBadRecord.drop)
    """`drop` (counted and shown) or `error`."""
    max_bad_share: float = key(0.05, ge=0, le=1, verbs=VERBS_WITH_DATA)
    """If more than this share of the records is dropped, it is an error."""
    text_as_messages: bool = key(False, verbs=VERBS_WITH_DATA)
    """Render plain-text prompts by the chat template, as a user turn."""
    template: TextTemplate = key(TextTemplate.auto, verbs=VERBS_WITH_DATA)
    """Encoding of a chat template's tokens that are spelled in texts: as tokens (`applied`), as ordinary text
    (`literal`), or as text with an error if most records have them (`auto`)."""
    chat_template: Filled | None = key(None, verbs=VERBS_WITH_DATA)
    """Chat template: a file, or the name of one of the tokenizer's templates; null: the tokenizer's own."""
    template_arguments: dict[str, Any] | None = key(None, accepts="a mapping", verbs=VERBS_WITH_DATA)
    """Arguments of the chat template for all records, such as `{enable_thinking: false}`; null: none."""
    trained_roles: list[Role] = key(
        ["assistant"], min_length=1, accepts=f"a list of {', '.join(get_args(Role))}"
    )
    """Roles whose turns in a response the loss counts."""
    untrained: list[Untrained] = key(
        ["empty_thoughts"], accepts=f"a list of {', '.join(UNTRAINED_PARTS)} or BEGIN...END"
    )
    """Parts of these turns that the loss does not count: `empty_thoughts`, `thoughts`, `formatting` (tokens
    around turns), or the text from one marker to another, as `<note>...</note>`."""
    ranked: Ranked = key(Ranked.whole)
    """A ranking of more than two responses becomes one example, its best and worst, or all pairs."""
    cache: Filled = key("${run.root}/encoded", free=True)
    """Folder of encoded data, shared by runs."""
    processes: int | None = key(None, ge=1, free=True)
    """Processes that encode; null: one per core, if there are enough records."""

    @property
    def eval_sources(self) -> list[SourceConfig]:
        """The sources of the evaluation data; empty if there are none."""
        return list(self.eval) or (list(self.train) if self.eval_share else [])
