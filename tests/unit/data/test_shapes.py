"""The table of known shapes: of each row a record that it reads, and its neighbour that is refused."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.data.config import SourceConfig
from dpo_dist.data.formats import read_records
from dpo_dist.data.read.reading import parse_prompt, parse_record
from dpo_dist.data.read.shapes import declared
from dpo_dist.data.records import NOT_KEPT, BadRecord, Dialogue, Origin, PreferenceRecord, turns_of
from dpo_dist.foundation.errors import DataError
from dpo_dist.foundation.files import own_table
from tests.support.pages import ROOT
from tests.support.records import TEXT, assistant, jsonl, parsed, user

TABLE = own_table(ROOT / "dpo_dist" / "data" / "read" / "shapes.yaml")
SHAPES: dict[str, dict[str, Any]] = TABLE["shapes"]
PAIR = {"chosen": "good", "rejected": "bad"}
Q, GOOD, BAD = user("q"), assistant("good"), assistant("bad")
WHOLE = {"chosen": [Q, GOOD], "rejected": [Q, BAD]}
HUMAN = "\n\nHuman: q\n\nAssistant:"
SHARED = [{"from": "human", "value": "q"}]
ANSWER = {"from": "gpt", "value": "good"}
CALLS = {"functions": None, "function_calls": "f()"}
SAFE = {"prompt": "q", "response_0": "bad", "response_1": "good", "better_response_id": 1}
ARENA = {"model_a": "x", "model_b": "y", "winner": "model_a"}
ARENA |= {"conversation_a": [Q, GOOD], "conversation_b": [Q, BAD]}
RATED = [{"response": "bad", "fine-grained_score": 1.0}, {"response": "good", "fine-grained_score": 4.5}]
KAGGLE = {"prompt": '["q"]', "response_a": '["bad"]', "response_b": '["good"]', "winner_model_a": 0}
KAGGLE |= {"winner_model_b": 1, "winner_tie": 0}
ORIGINAL = {"orig_instruction": "q", "orig_response_A": "bad", "orig_response_B": "good"}
ORIGINAL |= {"orig_preference": "B", "instruction": "a long one", "output": "B"}
SIDES = {"data": {"prompt": "q", "answer1": "bad", "answer2": "good"}}
RIGHT = {"was_cancelled": False, "result": [{"value": {"selected": "right"}}]}
SKIPPED = {"was_cancelled": True, "result": [{"value": {"selected": "left"}}]}
SELECTED = {"annotations": [SKIPPED, RIGHT]}
NONE: dict[str, Any] = {}

# The record; what its prompt is: a text, a turn or a dialogue; and changes with which nothing reads it as the
# same pair (None: the column is not there).
ROWS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "pair": (TEXT, "text", {"winner": "rejected"}),
    "text": (TEXT, "text", {"chosen": [GOOD]}),
    "conversations_pair": (WHOLE, "turn", {"question": "another one"}),
    "implicit_prompt": ({"chosen": "q good", "rejected": "q bad"}, "text", {"topic": "the prompt, perhaps"}),
    "hh": ({"chosen": f"{HUMAN} good", "rejected": f"{HUMAN} bad"}, "dialogue", {"system": "Be kind."}),
    "hh_prompt": ({"prompt": HUMAN} | {"chosen": " good", "rejected": " bad"}, "dialogue", {"tools": [{}]}),
    "question_pair": (PAIR | {"question": "q"}, "turn", {"context": "a text"}),
    "query_pair": (PAIR | {"query": "q"}, "turn", {"response": "another"}),
    "input_pair": (PAIR | {"input": "q"}, "turn", {"output": "another"}),
    "alpaca_pair": (PAIR | {"instruction": "q"}, "turn", {"question": "another"}),
    "alpaca_pair_input": (PAIR | {"instruction": "q", "input": ""}, "turn", {"input": 0}),
    "sharegpt_pair": (PAIR | {"conversations": SHARED}, "turn", {"conversations": [*SHARED, ANSWER]}),
    "sharegpt_with_answer": (
        {"conversations": [*SHARED, ANSWER], "chosen": ANSWER, "rejected": ANSWER | {"value": "bad"}},
        "turn",
        {"chosen": ANSWER | {"value": "another"}},
    ),
    "messages_pair": (PAIR | {"messages": [Q]}, "turn", {"prompt": "another"}),
    "messages_with_answer": (PAIR | {"messages": [Q, GOOD]}, "turn", {"chosen": "another"}),
    "messages_with_turn": (
        {"messages": [Q, GOOD], "chosen": [GOOD], "rejected": [BAD]},
        "turn",
        {"chosen": [assistant("another")]},
    ),
    "messages_and_chosen": (WHOLE | {"messages": [Q, GOOD]}, "turn", {"messages": [Q, assistant("another")]}),
    "openai_pair": (
        {
            "input": {"messages": [Q], "parallel_tool_calls": True},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        },
        "turn",
        {"input": {"text": "q"}},
    ),
    "openai_list_pair": (
        {
            "input": [Q | {"type": "message"}],
            "preferred_output": [GOOD | {"type": "message"}],
            "non_preferred_output": [BAD],
        },
        "turn",
        {"input": "q"},
    ),
    "swift_query": (
        {"query": "q", "response": "good", "rejected_response": "bad"},
        "turn",
        {"response": None},
    ),
    "swift_messages": ({"messages": [Q, GOOD], "rejected_response": "bad"}, "turn", {"messages": [Q]}),
    "swift_rejected": ({"messages": [Q, GOOD], "rejected_messages": [Q, BAD]}, "turn", {"label": True}),
    "openpipe": ({"messages": [Q, GOOD], "rejected_message": BAD}, "turn", {"rejected_message": Q}),
    "torchtune": (
        {"chosen_conversations": [Q, GOOD], "rejected_conversations": [Q, BAD]},
        "turn",
        {"chosen_conversations": [Q]},
    ),
    "chosen_messages": (
        {"chosen_messages": [Q, GOOD], "rejected_messages": [Q, BAD]},
        "turn",
        {"preference": "b"},
    ),
    "chosen_message": (
        {"prompt": "q", "chosen_message": GOOD, "rejected_message": BAD},
        "turn",
        {"label": 1},
    ),
    "prompt_responses": (
        {"prompt": "q", "chosen_response": "good", "rejected_response": "bad"},
        "text",
        {"response": "another"},
    ),
    "question_responses": (
        {"question": "q", "response_chosen": "good", "response_rejected": "bad"},
        "turn",
        {"chosen": "another"},
    ),
    "scored": (
        {"prompt": "q", "responses": ["bad", "good"], "scores": [1, 2]},
        "text",
        {"ranking": 3, "scores": None},
    ),
    "scored_completions": (
        {"prompt": "q", "completions": ["bad", "good"], "scores": [1, 2]},
        "text",
        {"scores": None},
    ),
    "scored_messages": (
        {"prompt": "q", "responses": [BAD | {"score": 1}, GOOD | {"score": 2}]},
        "turn",
        {"responses": [BAD | {"score": 1, "image": "a.png"}, GOOD | {"score": 2}]},
    ),
    "scored_inside": (
        {"prompt": "q", "responses": [{"content": "bad", "score": 1}, {"content": "good", "score": 2}]},
        "text",
        {"responses": [{"content": "bad", "score": 1, "image": "a.png"}, {"content": "good", "score": 2}]},
    ),
    "scored_completions_inside": (
        {"prompt": "q", "completions": [{"content": "bad", "score": 1}, {"content": "good", "score": 2}]},
        "text",
        {"completions": [{"content": "bad", "rank": 1}, {"content": "good", "rank": 2}]},
    ),
    "ranked": ({"prompt": "q", "responses": ["good", "bad"]}, "text", {"scores": [1, 2]}),
    "nemo_ranked": (
        {
            "context": [Q],
            "completions": [{"rank": 1, "completion": [BAD]}, {"rank": 0, "completion": [GOOD]}],
        },
        "turn",
        {"context": None},
    ),
    "labelled": ({"prompt": "q", "completion": "good", "label": "true"}, "text", {"label": "A"}),
    "labelled_text": ({"prompt": "q", "completion": "good", "label": 1}, "text", {"label": 0.5}),
    "kto_completion": ({"prompt": "q", "completion": "good", "kto_tag": True}, "text", {"kto_tag": "good"}),
    "labelled_messages": ({"messages": [Q, GOOD], "label": True}, "turn", {"label": "B"}),
    "kto_messages": ({"messages": [Q, GOOD], "kto_tag": True}, "turn", {"label": False}),
    "kto_sharegpt": ({"conversations": [*SHARED, ANSWER], "kto_tag": 1}, "turn", {"kto_tag": 3}),
    "kto_alpaca": ({"instruction": "q", "output": "good", "kto_tag": 1}, "turn", {"output": ["good"]}),
    "prompt_completion": ({"prompt": "q", "completion": "good"}, "text", {"chosen": "another"}),
    "hh_completion": ({"prompt": HUMAN, "completion": " good"}, "dialogue", {"system": "Be kind."}),
    "conversation": (
        {"messages": [Q, GOOD]},
        "turn",
        {"messages": [Q, BAD | {"chosen": False}, GOOD | {"chosen": True}]},
    ),
    "sharegpt": ({"conversations": [*SHARED, ANSWER]}, "turn", {"conversations": SHARED}),
    "alpaca": ({"instruction": "q", "output": "good"}, "turn", {"output": ["good", "bad"]}),
    "swift_response": ({"query": "q", "response": "good"}, "turn", {"response": ["good", "bad"]}),
    "completion": (TEXT, "text", {"label": True}),
    "prompts": ({"prompt": "q"}, "text", {"question": "another"}),
    "questions": ({"question": "q"}, "turn", {"instruction": "another"}),
    "queries": ({"query": "q"}, "turn", {"history": 3}),
    "instructions": ({"instruction": "q", "input": None}, "turn", {"input": 3}),
    "open_messages": ({"messages": [Q]}, "turn", {"messages": [Q | {"mood": "calm"}]}),
    "open_conversations": (
        {"conversations": SHARED},
        "turn",
        {"conversations": [{"from": "x", "value": "q"}]},
    ),
    # Public data sets.
    "scores_in_metadata": (
        TEXT | {"metadata": {"score_chosen": 4, "score_rejected": 1}},
        "text",
        {"metadata": {"score_chosen": 4}},
    ),
    "ultrafeedback_binarized": (
        WHOLE
        | {"prompt": "q", "prompt_id": "1", "messages": [Q, GOOD], "score_chosen": 8, "score_rejected": 2},
        "turn",
        {"winner": "b"},
    ),
    "ultrafeedback": (
        {"instruction": "q", "completions": RATED, "correct_answers": ["None"]},
        "turn",
        {"completions": [{"response": "bad"}, {"response": "good"}]},
    ),
    "ultrafeedback_argilla": (
        {"instruction": "q", "chosen_response": "good", "rejected_response": "bad", "chosen_avg_rating": 5.0},
        "turn",
        {"chosen_response": None},
    ),
    "orca_argilla": (
        PAIR | {"system": "", "input": "q", "chosen_score": 8, "original_chosen": "bad", "status": "swapped"},
        "turn",
        {"tie": True},
    ),
    "capybara_argilla": (
        WHOLE
        | {"prompt": "q", "conversation": [{"input": "q", "output": "good"}], "original_response": "good"},
        "turn",
        {"original_response": None},
    ),
    "orpo_mix": (WHOLE | {"prompt": "q", "question": "q"}, "turn", {"chosen": "good"}),
    "magpie": (WHOLE | {"uuid": "1", "instruction": "q"}, "turn", {"uuid": None}),
    "pairrm": (
        WHOLE | {"prompt": "q", "all_generated_responses": ["good", "bad"], "all_rm_scores": [1, 0]},
        "turn",
        {"chosen": [BAD], "rejected": [BAD]},
    ),
    "open_hermes_preferences": (
        WHOLE | {"prompt": "q", "candidates_completions": ["a"], "candidate_policies": ["b"], "ranks": [1]},
        "turn",
        {"candidate_policies": None},
    ),
    "dolci": (
        {"chosen": [Q | CALLS, GOOD | CALLS], "rejected": [Q | CALLS, BAD | CALLS]},
        "turn",
        {"chosen": [Q, GOOD | CALLS]},
    ),
    "helpsteer2_preference": (
        {
            "prompt": "q",
            "response_1": "good",
            "response_2": "bad",
            "preference_strength": -2,
            "preference_statement": "x",
        },
        "text",
        {"preference_strength": 0},
    ),
    "helpsteer3_preference": (
        {
            "context": [Q],
            "response1": "bad",
            "response2": "good",
            "overall_preference": 1,
            "individual_preference": [],
        },
        "turn",
        {"overall_preference": None},
    ),
    "helpsteer3_edits": (
        {
            "context": [Q],
            "original_response": "x",
            "good_edited_response": "good",
            "bad_edited_response": "bad",
        },
        "turn",
        {"original_response": None},
    ),
    "shp": (
        {"history": "q", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0},
        "turn",
        {"labels": 2},
    ),
    "nectar": (
        {
            "prompt": f"{HUMAN} ",
            "answers": [{"answer": "bad", "rank": 2}, {"answer": "good", "rank": 1}],
            "turns": 1,
        }
        | {"num_responses": 2},
        "dialogue",
        {"answers": [{"answer": "bad"}, {"answer": "good"}]},
    ),
    "arena": (ARENA, "turn", {"winner": "tie (bothbad)"}),
    "arena_55k": (KAGGLE, "text", {"winner_tie": 1}),
    "saferlhf_helpful": (SAFE | {"safer_response_id": 0}, "text", {"better_response_id": -1}),
    "saferlhf_safe": (
        SAFE | {"better_response_id": 0, "safer_response_id": 1},
        "text",
        {"safer_response_id": 3},
    ),
    "saferlhf_single": (SAFE, "text", {"better_response_id": None}),
    "align_anything": (
        {"question": "q", "response_1": "bad", "response_2": "good", "overall_response": 2},
        "turn",
        {"overall_response": 0},
    ),
    "webgpt": (
        {
            "question": {"full_text": "q"},
            "answer_0": "bad",
            "answer_1": "good",
            "score_0": -1.0,
            "score_1": 1.0,
        },
        "turn",
        {"score_1": -1.0},
    ),
    "summarize": (
        {
            "info": {"post": "q", "article": None},
            "summaries": [{"text": "bad"}, {"text": "good"}],
            "choice": 1,
        },
        "text",
        {"choice": "1"},
    ),
    "stack_exchange": (
        {"question": "q", "response_j": "good", "response_k": "bad"},
        "turn",
        {"response_k": None},
    ),
    "prometheus": (ORIGINAL, "turn", {"orig_preference": "Tie"}),
    "step_dpo": (
        PAIR | {"prompt": "q", "initial_reason_steps": "Step 1: ", "full_chosen": "x", "answer": "4"},
        "turn",
        {"initial_reason_steps": [1]},
    ),
    "rlhf_v": (
        {"ds_name": "x", "image": None, "text": json.dumps(PAIR | {"question": "q"})},
        "turn",
        {"text": "q"},
    ),
    "ultra_interact": (
        PAIR | {"trajectory": [{"from": "user", "value": "q"}], "parent_id": "0"},
        "turn",
        {"trajectory": "q"},
    ),
    "full_hh": (
        {"prompt": HUMAN, "response": " good", "chosen": " good", "rejected": " bad"},
        "dialogue",
        {"prompt": "q"},
    ),
    "code_preference": ({"input": "q", "accepted": "good", "rejected": "bad"}, "turn", {"accepted": None}),
    "when2call": (
        {"messages": [Q], "tools": ['{"name": "f"}'], "chosen_response": GOOD, "rejected_response": BAD},
        "turn",
        {"tools": ["no JSON"]},
    ),
    "distilabel_ratings": (
        {"instruction": "q", "generations": ["bad", "good"], "ratings": [1.0, 5.0]},
        "turn",
        {"ratings": [3.0, 3.0]},
    ),
    "no_robots": ({"prompt": "q", "prompt_id": "1", "messages": [Q, GOOD]}, "turn", {"messages": [Q]}),
    "nemotron_post": ({"input": [Q], "output": "good"}, "turn", {"input": "q"}),
    "xlam": (
        {"query": "q", "answers": '[{"name": "f", "arguments": {}}]', "tools": '[{"name": "f"}]'},
        "turn",
        {"answers": "[]"},
    ),
    "agent_traces": ({"messages": [Q, GOOD], "resolved": True}, "turn", {"resolved": "partly"}),
    "label_studio": (SIDES | SELECTED, "turn", {"annotations": [{"result": []}]}),
    "label_studio_min": (
        {"prompt": "q", "answer1": "bad", "answer2": "good", "comparison": "right"},
        "turn",
        {"comparison": "both"},
    ),
}
PROMPTS = {
    "scored_messages": "q",
    "summarize": "q\n\nTL;DR:",
    "implicit_prompt": "q",
}


def test_each_row_has_a_record_and_its_neighbour() -> None:
    assert ROWS.keys() == SHAPES.keys()


def read(name: str, record: dict[str, Any]) -> Any:
    """Return a record as the only one of its source, by the shape's name where columns do not tell it."""
    shape = SHAPES[name]
    needs_name = shape.get("by_name") or name.startswith("saferlhf_")
    parse: dict[str, Any] = {"parse": parse_prompt, "of_prompts": True} if shape.get("prompts") else {}
    return parsed(record, **parse, **({"fields": name} if needs_name and name != "saferlhf_single" else {}))


@pytest.mark.parametrize("name", ROWS)
def test_a_shape_reads_its_record(name: str) -> None:
    record, form, _ = ROWS[name]
    found = read(name, record)
    assert isinstance(found, PreferenceRecord), found
    is_dialogue = isinstance(found.prompt, Dialogue)
    assert ("dialogue" if is_dialogue else "text" if isinstance(found.prompt, str) else "turn") == form
    *before, question = turns_of(found.prompt, "user")
    assert (question.role, question.content.strip(), before) == ("user", PROMPTS.get(name, "q"), [])
    responses = [turns_of(response)[-1].content.strip() for response in found.responses]
    is_prompt = SHAPES[name].get("prompts")
    if name == "xlam":
        assert found.responses[0][0].fields["tool_calls"][0]["function"]["name"] == "f"
    elif "completion" in SHAPES[name]["fields"] or is_prompt:
        assert responses == ([] if is_prompt else ["good"])
    else:
        first = "Step 1: " if name == "step_dpo" else ""
        assert responses == [f"{first}good", f"{first}bad"]
    if "label" in SHAPES[name]["fields"]:
        assert found.scores == (1.0,)


@pytest.mark.parametrize("name", ROWS)
def test_its_neighbour_is_refused(name: str) -> None:
    record, _, changes = ROWS[name]
    changed = {key: value for key, value in (record | changes).items() if value is not None}
    assert isinstance(read(name, changed), BadRecord)


@pytest.mark.parametrize("annotations", [[], None, [SKIPPED], [RIGHT, RIGHT], [RIGHT | {"result": []}]])
def test_a_task_without_one_label_is_not_kept(annotations: Any) -> None:
    labelled, unlabelled = (each | SIDES for each in (SELECTED, {"annotations": annotations}))
    reading, _ = declared(iter([(labelled, Origin("here", 1))]), SourceConfig("here"))
    found = parse_record(unlabelled, reading, Origin("here", 2))
    assert isinstance(found, BadRecord)
    assert found.reason == NOT_KEPT


def test_turns_of_an_arena_are_those_that_were_judged() -> None:
    assert isinstance(parsed(ARENA | {"turn": 1}), PreferenceRecord)
    judged = {"conversation_a": [Q, GOOD, Q, BAD], "conversation_b": [Q, BAD, Q, GOOD]}
    assert isinstance(parsed(ARENA | judged | {"turn": 2}), PreferenceRecord)
    assert isinstance(parsed(ARENA | judged | {"turn": 1}), BadRecord)


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        (WHOLE | {"prompt": None, "messages": None}, "q"),
        (PAIR | {"prompt": "q", "question": None, "messages": None}, "q"),
        (PAIR | {"question": "q", "prompt": None, "query": None}, "q"),
        (PAIR | {"prompt": "chosen"}, "chosen"),
    ],
)
def test_a_column_of_nulls_is_none_and_a_prompt_may_be_any_text(record: dict[str, Any], prompt: str) -> None:
    found = parsed(record)
    assert isinstance(found, PreferenceRecord), found
    assert [turn.content for turn in turns_of(found.prompt, "user")] == [prompt]


def test_texts_beside_a_column_of_nulls_are_no_implicit_prompt() -> None:
    assert isinstance(parsed({"chosen": "q good", "rejected": "q bad", "prompt": None}), BadRecord)


def test_scores_of_two_responses_beside_one_are_not_read() -> None:
    one = {"prompt": "q", "completion": "good", "score_chosen": 1, "score_rejected": 2}
    found = parsed(one)
    assert isinstance(found, BadRecord)
    assert found.reason == "unread_column"


def test_a_shape_fits_records_of_which_none_is_whole_only_by_its_condition() -> None:
    rows = [{"question": ["q"], "chosen": "a"}, {"question": ["q"], "rejected": "b"}]
    records = iter([(row, Origin("here", place)) for place, row in enumerate(rows)])
    with pytest.raises(DataError, match="none of the known shapes"):
        declared(records, SourceConfig("here"))


def test_60_public_data_sets_and_more_have_a_shape() -> None:
    names = {name for shape in SHAPES.values() for name in shape.get("sets", ()) if "/" in name}
    assert len(names) > 60


@pytest.mark.parametrize(
    ("record", "names"),
    [
        (SAFE | {"safer_response_id": 0}, ["saferlhf_helpful", "saferlhf_safe"]),
        (PAIR | {"prompt": "q", "messages": [Q, GOOD]}, ["pair", "messages_with_answer"]),
    ],
)
def test_two_shapes_that_match_are_an_error_with_a_line_for_each(
    tmp_path: Path, record: dict[str, Any], names: list[str]
) -> None:
    with pytest.raises(DataError, match="2 known meanings") as raised:
        list(read_records(jsonl(tmp_path, *[record] * 3)))
    assert raised.value.got == ", ".join(names)
    for name, source in zip(names, sources_in(raised.value.remedy), strict=True):
        assert source.fields == name
        assert all(isinstance(each, PreferenceRecord) for each in read_records(source))


def sources_in(remedy: str) -> list[SourceConfig]:
    """Return the sources that an error's lines write, as a shell and the configuration read them."""
    lines = [shlex.split(f"data.train={rest}")[0] for rest in remedy.split("data.train=")[1:]]
    words = [line.removesuffix(";") for line in lines]
    return [load_run_config(["model.path=m", word]).data.train[0] for word in words]
