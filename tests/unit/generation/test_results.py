"""Pairs and samples of finished stages: chosen, counted, with their origin."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpo_dist.config.load import load_run_config
from dpo_dist.config.verb_options import DropOrKeep, PairsConfig, PairSelection, PairsMethod
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import Message, PreferenceRecord
from dpo_dist.generation.pairs.prompts import open_prompts, write_prompts
from dpo_dist.generation.pairs.run import Results, pairs_of, samples_of, usable
from dpo_dist.generation.sampling.respond import Answer, Answers, ModelSource
from dpo_dist.generation.sampling.stages import Parts
from tests.support.records import jsonl, user

DROP, KEEP = DropOrKeep.drop, DropOrKeep.keep


def sample(content: str, number: int = 0, tokens: int = 1, **facts: Any) -> Answer:
    return Answer(number, content, tokens, **{"finished": True, "same_ids": True} | facts)


def test_samples_that_are_not_used_are_counted_by_reason() -> None:
    samples = [
        sample("a"),
        sample("a "),
        sample("a", fields={"reasoning_content": "t"}),
        sample(" "),
        sample("b", finished=False),
        sample("c", same_ids=False),
    ]
    kept, counts = usable(samples, PairsConfig())
    assert [samples.index(each) for each in kept] == [0, 2, 5]
    assert counts == {"identical": 1, "empty": 1, "unfinished": 1}
    kept, counts = usable(samples, PairsConfig(unfinished=KEEP))
    assert [samples.index(each) for each in kept] == [0, 2, 4, 5]
    assert counts == {"identical": 1, "empty": 1}


MODELS = [ModelSource(name, Path(name), None, None, f"digest of {name}") for name in ("one", "other")]
THOUGHT = {"reasoning_content": "I add."}


def finished(folder: Path, method: str = "samples", **keys: Any) -> Results:
    """Results of two models of two samples each, to three prompts in parts of two."""
    source = jsonl(folder, *({"prompt": [user(f"question {n}")]} for n in range(3)))
    config = load_run_config(["model.path=m", f"data.train=[{source}]"])
    prompts = open_prompts(write_prompts(folder, config, lambda _: None), 2)
    responses = []
    for model, name in enumerate(("a", "b")):
        numbers = range(2) if method == "samples" else range(1)
        rows = [
            asdict(Answers("key", [sample(f"{name}{n}", 2 * model + n, n + 1) for n in numbers]))
            for _ in range(3)
        ]
        rows[0]["answers"][0]["fields"] = THOUGHT
        rows[2] = asdict(Answers("key", [], "too_long")) if model else rows[2]
        parts = Parts.of(folder, f"responses{model}", {}, 2)
        parts.open()
        parts.write(0, rows[:2])
        parts.write(1, rows[2:])
        responses.append(parts)
    scores = None
    if method == "samples":
        scores = Parts.of(folder, "scores", {}, 2)
        scores.open()
        judged = [{"0": 3.0, "1": 1.0, "2": 1.0, "3": None}, {"0": 2.0, "1": 2.0, "2": 2.0, "3": 2.0}]
        counts = {"unreadable": 1}
        scores.write(0, [{"scores": each, "counts": counts} for each in judged])
        scores.write(1, [{"scores": {}, "counts": {}}])
    pairs = PairsConfig(method=PairsMethod(method), select=PairSelection.all_pairs, **keys)
    return Results(pairs, prompts, MODELS, responses, scores, {"sampling": "facts"})


def test_pairs_of_scored_samples_have_their_origin_and_are_counted(tmp_path: Path) -> None:
    results = finished(tmp_path)
    pairs = list(pairs_of(results))
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [
        ([{"role": "assistant", "content": "a0", **THOUGHT}], [{"role": "assistant", "content": "a1"}]),
        (
            [{"role": "assistant", "content": "a0", **THOUGHT}],
            [{"role": "assistant", "content": "b0", **THOUGHT}],
        ),
    ]
    assert {(row["score_chosen"], row["score_rejected"]) for row in pairs} == {(3.0, 1.0)}
    provenance = pairs[1]["provenance"]
    assert provenance["rejected"] == {
        "model": {"name": "other", "revision": None, "digest": "digest of other"},
        **{"number": 2, "tokens": 1, "finished": True},
    }
    assert provenance["source"].endswith("records.jsonl:1")
    assert (provenance["select"], provenance["sampling"]) == ("all_pairs", "facts")
    assert +results.counts == {
        **{"prompts": 3, "samples": 10, "unreadable": 2, "samples_without_score": 1},
        **{"tied_pairs": 1 + 6, "prompts_all_tied": 1, "prompts_dropped_too_long": 1},
    }


def test_all_responses_are_a_scored_list_that_is_read_again(tmp_path: Path) -> None:
    rows = list(samples_of(finished(tmp_path)))
    assert [len(row["responses"]) for row in rows] == [3, 4, 0]
    assert [each["content"] for each in rows[0]["unused"]] == ["b1"]
    assert [len(row["unused"]) for row in rows] == [1, 0, 2]
    assert rows[2]["provenance"]["dropped"] == "too_long"
    (record,) = read_records(str(jsonl(tmp_path, rows[0])))
    assert isinstance(record, PreferenceRecord)
    assert record.scores == (3.0, 1.0, 1.0)
    assert record.responses[0] == (Message("assistant", "a0", THOUGHT),)
    assert record.responses[1] in ("a1", (Message("assistant", "a1"),))


def test_a_delta_pair_needs_a_response_of_both_models(tmp_path: Path) -> None:
    results = finished(tmp_path, "delta")
    rows = results.responses[1].read(0)
    rows[1]["answers"][0]["finished"] = False
    results.responses[1].write(0, rows)
    pairs = list(pairs_of(results))
    assert [row["chosen"][0]["content"] for row in pairs] == ["a0"]
    assert [row["rejected"][0]["content"] for row in pairs] == ["b0"]
    assert "score_chosen" not in pairs[0]
    assert "select" not in pairs[0]["provenance"]
    assert +results.counts == {
        **{"prompts": 3, "samples": 5, "samples_unfinished": 1},
        **{"prompts_too_few_responses": 1, "prompts_dropped_too_long": 1},
    }
