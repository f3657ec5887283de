"""The fields of records by name: one table of how each is read."""

import itertools

NUMBERS = {"loss_weight": 1.0, "soft_label": 1.0, "margin": 0.0}
"""Numbers with which a record may change its loss, and the value without effect: its weight in the mean, the
probability that its chosen response is the better one, and a margin that is subtracted from `b h`."""
CONVERSATIONS = ("conversations", "messages")
QUESTIONS = ("question", "query", "input")
"""A question in these fields is a user's turn."""
ASKED = ("prompt", "instruction", *QUESTIONS, *CONVERSATIONS)
"""A record with one of these fields has a prompt of its own."""
SYSTEMS = ("system", "system_prompt")
TOOLS = ("tools", "functions")
TOOLS_OF_SIDES = ("chosen_tools", "rejected_tools")
"""Both sides are rendered with the record's own tools."""
TEMPLATE_ARGUMENTS = "chat_template_kwargs"
LISTS = ("responses", "completions", "output")
IMAGES = ("images", "image")
MEDIA = ("audio", "audios", "video", "videos")
OBJECTS = ("objects", "bbox", "bboxes", "boxes")
"""Places in images, which the tags of ms-swift stand for."""
THOUGHTS = ("reasoning", "reasoning_content", "thinking", "thought", "thoughts")
IMAGES_OF_SIDES = tuple(f"{side}_{name}" for side in ("chosen", "rejected") for name in IMAGES)
LABELS = ("label", "kto_tag")
VOTES = ("votes_chosen", "votes_rejected")
PAIRS = (
    ("chosen", "rejected"),
    ("chosen_messages", "rejected_messages"),
    ("chosen_message", "rejected_message"),
    ("chosen_conversations", "rejected_conversations"),
    ("response_chosen", "response_rejected"),
    ("chosen_response", "rejected_response"),
    ("preferred_output", "non_preferred_output"),
    ("response", "rejected_response"),
    ("messages", "rejected_messages"),
    ("messages", "rejected_response"),
    ("messages", "rejected_message"),
)
"""Names of the chosen and the rejected side."""
SHARED_SIDES = ("messages", "response")
"""Other kinds of records have these fields too: alone they are no pair."""
SIDE_FIELDS = tuple(dict.fromkeys(name for name in itertools.chain(*PAIRS) if name not in SHARED_SIDES))
PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    # Read only if both sides have a score: some datasets score the chosen side only.
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
WHOLE = "record"
"""In `columns`: an object with the other fields."""
OTHERS = "*"
"""In `columns`, with null: read only the named columns. In a record: the names that were left out."""

# Names, and words for them:
# - columns: users may give the name in `columns`; rare: not each of the first records must have the field;
# - text, json, nulls: a text in it may be messages in JSON; is JSON; is JSON with the nulls that a table
#   writes for fields of other records' tools;
# - read: each of its values is read, or drops the record;
# - kept: it says, also without a value, what a record is: an empty response is not an absent one;
# - unread: a template or a model uses it, but no format does: the prompt would change.
_TABLE = (
    (("prompt",), "columns text read kept"),
    (("instruction",), "columns read kept"),
    (QUESTIONS, "columns text read kept"),
    (CONVERSATIONS, "columns json read kept"),
    (SIDE_FIELDS, "text kept"),
    ((*PAIRS[0], *PAIRS[1], "rejected_response"), "columns"),
    (("response",), "text kept"),
    (("completion",), "columns text kept"),
    (LISTS, "kept"),
    (("responses", "output"), "columns"),
    (SYSTEMS, "read"),
    (("history",), "json read"),
    (TOOLS, "nulls read"),
    ((*TOOLS_OF_SIDES, TEMPLATE_ARGUMENTS), "nulls read"),
    (("system", "history", "input", "tools", TEMPLATE_ARGUMENTS, "documents"), "columns rare"),
    (("context",), "text read"),  # of a question: no format adds it to the prompt, which must contain it
    (("conversation",), "read"),
    (("enable_thinking",), "read kept"),
    (IMAGES, "read"),
    (("images", "videos", "audios"), "columns rare"),
    (("documents", *MEDIA), "read unread"),
    (tuple(f"{side}_{name}" for side in ("chosen", "rejected") for name in MEDIA), "read unread"),
    # The model's thoughts, or the reasons of a judge.
    (tuple(f"{side}_{name}" for side in ("chosen", "rejected") for name in THOUGHTS), "read unread"),
    (IMAGES_OF_SIDES, "read"),
    (tuple(itertools.chain(*PAIR_SCORES)), "kept"),
    ((*PAIR_SCORES[0], "scores"), "columns rare"),
    (("scores",), "json kept"),
    (("metadata",), "json"),  # with the scores of a pair
    (NUMBERS, "columns rare read kept"),
    (VOTES, "columns rare read kept"),
    (("label",), "columns rare"),
    (LABELS, "kept"),
    (("weight", "sample_weight"), "read kept"),
    (("provenance",), "read"),  # how `pairs` made the record
    ((WHOLE,), "columns"),
    ((OTHERS,), "kept"),
)


def fields_with(word: str) -> tuple[str, ...]:
    """Return the names of the fields that have a word in the table."""
    return tuple(dict.fromkeys(name for names, words in _TABLE if word in words.split() for name in names))


FIELDS = fields_with("columns")
"""The names that users may give in `columns`."""
