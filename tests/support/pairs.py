"""Records for tests, and their encoding."""

from transformers import PreTrainedTokenizerFast

from dpo_dist.data.config import DataConfig
from dpo_dist.data.encode import EncodedExample, encode_pair
from dpo_dist.data.records import BadRecord, Dialogue, Message, Messages, Origin, PreferenceRecord

CHAT = (Message("user", "What is the capital?"),)
WIDE = DataConfig(max_length=100_000, text_as_messages=False)


def record(prompt: str | Messages | Dialogue, *responses: str) -> PreferenceRecord:
    """Return a record with these responses, or with two default ones."""
    return PreferenceRecord(prompt, responses or ("It is Paris.", "I cannot do that."), Origin("here", 1))


def encode(
    what: PreferenceRecord, tokenizer: PreTrainedTokenizerFast, config: DataConfig = WIDE
) -> EncodedExample:
    pair = encode_pair(what, config, tokenizer)
    assert isinstance(pair, EncodedExample), pair
    return pair


def reason_against(
    what: PreferenceRecord, tokenizer: PreTrainedTokenizerFast, config: DataConfig = WIDE
) -> str:
    bad = encode_pair(what, config, tokenizer)
    assert isinstance(bad, BadRecord), bad
    return bad.reason


def texts(pair: EncodedExample, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(ids) for ids in (pair.prompt_ids, *pair.responses)]


def flags(pair: EncodedExample) -> tuple[bool, ...]:
    """Return whether the prompt was truncated, a response truncated, a response resplit."""
    return tuple(
        name in pair.changes for name in ("prompt_truncated", "response_truncated", "boundary_resplit")
    )
