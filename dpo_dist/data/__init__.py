"""Preference data: any file, any chat template and any image to token ids and masks of the loss.

Needs nothing of the rest of this package but `foundation`, no torch for texts, and no GPU. A record is what a
source says (`PreferenceRecord`), an example what a model reads (`Example`); a record that cannot be used is a
`BadRecord`. docs/python.md#data-for-another-trainer begins with five lines.

- **Configuration**: `DataConfig` has the limits and the template, `ScoredDataConfig` the same for a reward
  model, `UnpairedDataConfig` for a loss of single responses; `SourceConfig` has one source (`Source`: also as
  a path).
- **Sources**: `read_records` yields the records of a source; `DataSource` has also its files and checks.
  `source_labels` names sources, `full_name` their files, `Part` divides records into those to train and to
  evaluate, `write_records` writes records in memory to a file.
- **Records**: `PreferenceRecord` has a `Prompt` and `Response`s, which are texts, `Message`s or a
  `Dialogue`; `ImageFile`s stand at the `IMAGE` characters of contents; `Origin` says whence a record is. A
  `Record` is also a `BadRecord`, which an `UnusableRecordError` becomes; a `RawRecord` is not parsed yet.
  `turns_of` returns a prompt or a response as messages, `prompt_hash` 64 bits by which prompts are compared.
  `NUMBERS` change the loss of a record; `SCORERS` may read another prompt.
- **Encoding**: `encode_record` returns an `EncodedRecord`, whose `examples()` are `EncodedExample`s:
  `Example`s of `TokenIds` and a `Mask` for each response, with an `ImageInput` (`ExpandedImage`) for each
  image that an `ImageProcessor` reads. `ChatTemplate` chooses the template, `trained_stops` has the tokens
  that end responses, `final_tokens` those at the end of whole texts.
- **Counts**: `DataCounts` counts kept, dropped and changed records by each record's `Outcome`, checks that
  enough is left, and says so: `describe_counts`, `named_in_one_line`.

Each name is imported when it is asked for: a part needs no package of the others.
"""

from typing import TYPE_CHECKING

from dpo_dist.foundation.lazy import lazy_names

if TYPE_CHECKING:
    from dpo_dist.data.config import (
        DataConfig,
        ScoredDataConfig,
        Source,
        SourceConfig,
        UnpairedDataConfig,
    )
    from dpo_dist.data.counts import DataCounts, Outcome, describe_counts, named_in_one_line
    from dpo_dist.data.encode import EncodedExample, EncodedRecord, encode_record
    from dpo_dist.data.example import Example, ImageInput, Mask, TokenIds
    from dpo_dist.data.formats import read_records
    from dpo_dist.data.images import ExpandedImage, ImageProcessor
    from dpo_dist.data.read.files import write_records
    from dpo_dist.data.read.plain import NUMBERS
    from dpo_dist.data.read.sources import DataSource, full_name, source_labels
    from dpo_dist.data.records import (
        IMAGE,
        SCORERS,
        BadRecord,
        Dialogue,
        ImageFile,
        Message,
        Origin,
        Part,
        PreferenceRecord,
        Prompt,
        RawRecord,
        Record,
        Response,
        UnusableRecordError,
        prompt_hash,
        turns_of,
    )
    from dpo_dist.data.text.render import final_tokens, trained_stops
    from dpo_dist.data.text.template import ChatTemplate

__all__, __getattr__ = lazy_names(__name__, __file__)
