"""Records for tests, and what encoding made of them."""

from transformers import PreTrainedTokenizerFast

from dpo_dist.config.schema import DataConfig
from dpo_dist.data.encode import EncodedExample, encode_pair
from dpo_dist.data.records import BadRecord, Dialogue, Message, Messages, Origin, PreferenceRecord

CHAT = (Message("user", "What is the capital?"),)
WIDE = DataConfig(max_length=100_000)


def record(prompt: str | Messages | Dialogue, *responses: str) -> PreferenceRecord:
    """A record with these responses, or with two of its own."""
    return PreferenceRecord(prompt, responses or ("It is Paris.", "I cannot do that."), Origin("here", 1))


def encode(
    what: PreferenceRecord, tokenizer: PreTrainedTokenizerFast, config: DataConfig = WIDE
) -> EncodedExample:
    """The pair that must come of `what`."""
    pair = encode_pair(what, tokenizer, config)
    assert isinstance(pair, EncodedExample), pair
    return pair


def reason_against(
    what: PreferenceRecord, tokenizer: PreTrainedTokenizerFast, config: DataConfig = WIDE
) -> str:
    """Why no pair comes of `what`."""
    bad = encode_pair(what, tokenizer, config)
    assert isinstance(bad, BadRecord), bad
    return bad.reason


def texts(pair: EncodedExample, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Prompt and responses as text again."""
    return [tokenizer.decode(ids) for ids in (pair.prompt_ids, *pair.responses)]


def flags(pair: EncodedExample) -> tuple[bool, bool, bool]:
    """Prompt cut, response cut, response split off."""
    return (pair.prompt_truncated, pair.response_truncated, pair.boundary_resplit)
