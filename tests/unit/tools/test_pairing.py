"""Pairs by scores: prompts, selection, records with provenance that the trainer reads, counts."""

import itertools
import json
import os
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.config.schema import RunConfig
from dpo_dist.data import DataSource
from dpo_dist.data.formats import read_records
from dpo_dist.data.records import Message, PreferenceRecord
from dpo_dist.foundation.console import Console
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.reference.model_source import ModelSource
from dpo_dist.tools.pairs import __main__ as verb
from dpo_dist.tools.pairs.files import training_records
from dpo_dist.tools.pairs.make_pairs import (
    PairResults,
    different_prompts,
    pairs_from_results,
    pairs_from_scores,
    scored_lists,
    select_pairs,
)
from dpo_dist.tools.pairs.start import check_pairs, responding_models
from dpo_dist.tools.sampling.judges import Judgement
from dpo_dist.tools.sampling.keys import DropOrKeep, PairsConfig, PairSelection, PairsMethod
from dpo_dist.tools.sampling.prompts import Parts, Prompts, open_judge_together
from dpo_dist.tools.sampling.respond import Completion, Completions
from dpo_dist.tools.sampling.scores import joined_completions, score
from dpo_dist.training.start.open_run import Run
from tests.support.alone import ALONE
from tests.support.judge_server import judge_server
from tests.support.records import assistant, jsonl, user
from tests.support.tiny_model import write_model

ALL = PairSelection.all_pairs


def select(scores: list[float], key: int = 0, seed: int = 0, **rule: Any) -> tuple[Any, dict[str, int]]:
    counts: Counter[str] = Counter()
    return select_pairs(scores, PairsConfig(**rule), seed, str(key), counts), dict(+counts)


@pytest.mark.parametrize(
    ("scores", "rule", "pairs", "counts"),
    [
        ([2, 5, 1, 3], {}, [(1, 2)], {}),
        ([1, 5, 5, 1], {}, [(1, 0)], {"tied_pairs": 2}),
        ([1, 4, 2, 4], {"select": ALL, "margin": 1}, [(1, 0), (1, 2), (3, 0), (3, 2)], {"tied_pairs": 1}),
        ([2, 2, 2], {}, [], {"prompts_all_tied": 1, "tied_pairs": 3}),
        ([2], {}, [], {"prompts_too_few_responses": 1}),
        *(([3, 1], {"select": s, "margin": 2}, [], {"prompts_below_margin": 1}) for s in PairSelection),
        *(([3, 0.9], {"select": s, "margin": 2}, [(0, 1)], {}) for s in PairSelection),
    ],
)
def test_pairs_follow_scores_rule_and_margin(scores: Any, rule: Any, pairs: Any, counts: Any) -> None:
    found, counted = select(scores, **rule)
    assert (sorted(found), counted) == (pairs, counts)


def test_the_random_response_follows_from_seed_and_key_and_is_each_other_one_equally_often() -> None:
    def drawn(seed: int) -> list[tuple[int, int]]:
        return [select([3, 2, 1], key, seed, select=PairSelection.best_random)[0][0] for key in range(600)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert set(drawn(0)) == {(0, 1), (0, 2)}
    assert 250 < drawn(0).count((0, 1)) < 350


SCORED = {
    "prompt": [user("name a colour")],
    "responses": [{"content": text, "score": score} for text, score in [("a", 3), ("b", 9), ("c", 1)]],
}
PAIR = {
    "chosen": [user("hi"), assistant("hello")],
    "rejected": [user("hi"), assistant("no")],
    "score_chosen": 1,
    "score_rejected": 4,
}
PLAIN = {"prompt": "two and two is", "responses": ["four", "five"], "scores": [1.0, 0.5]}


def make(folder: Path, *records: Any, **keys: Any) -> tuple[Path, str]:
    said: list[str] = []
    source = jsonl(folder, *records)
    overrides = [f"pairs.{key}={value}" for key, value in keys.items()]
    config = load_run_config(["model.path=m", f"data.train=[{source}]", f"run.dir={folder}", *overrides])
    file = folder / "pairs/pairs.jsonl"
    pairs_from_scores(file, config.data, config.pairs, config.trainer.seed, said.append)
    return file, "\n".join(said)


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_provenance_names_the_line_and_the_rule_and_other_settings_replace_no_file(tmp_path: Path) -> None:
    few = SCORED | {"responses": [{"content": "a", "score": 1}, {"content": "b", "score": 2}]}
    file, said = make(tmp_path, few, SCORED, select="all_pairs", margin=3)
    found = rows(file)
    assert [(row["score_chosen"], row["score_rejected"]) for row in found] == [(9, 3), (9, 1)]
    assert found[0]["provenance"] == {
        **{"source": f"{tmp_path}/records.jsonl:2", "method": "scores", "select": "all_pairs"},
        **{"margin": 3.0, "seed": 0, "ranks": [1, 2], "responses": 3},
    }
    assert "1 prompts_below_margin: prompts without a pair" in said
    summary = json.loads(file.with_name("pairs.jsonl.summary.json").read_text())
    assert (summary["pairs"], summary["settings"]["margin"]) == (2, 3.0)
    assert summary["counts"] == {"prompts": 2, "prompts_below_margin": 1}
    with pytest.raises(ConfigError, match="margin: 3 before, 1 now"):
        make(tmp_path, few, SCORED, select="all_pairs", margin=1)
    assert rows(file) == found


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}
WITH_TOOLS = {
    "prompt": [
        {"role": "system", "content": "be brief"},
        user("rain?"),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "yes", "name": "weather"},
    ],
    "chosen": [{"role": "assistant", "content": "yes", "reasoning_content": "the tool says so"}],
    "rejected": [
        {"role": "assistant", "content": "one moment", "loss_weight": 0},
        user("well?"),
        {"role": "assistant", "content": "no", "loss_weight": 1},
    ],
    "tools": [WEATHER],
    "chat_template_kwargs": {"enable_thinking": False},
    **{"score_chosen": 2, "score_rejected": 1},
}
HH = {
    "chosen": "\n\nHuman: hi\n\nAssistant: yes",
    "rejected": "\n\nHuman: hi\n\nAssistant: no",
    **{"score_chosen": 2, "score_rejected": 1},
}


@pytest.mark.parametrize("records", [[PAIR | {"score_chosen": 9}], [WITH_TOOLS], [HH], [PLAIN]])
def test_no_field_of_a_record_is_lost(tmp_path: Path, records: list[Any]) -> None:
    file, _ = make(tmp_path, *records)
    whole = [list(read_records(str(path))) for path in (tmp_path / "records.jsonl", file)]
    for before, after in zip(*whole, strict=True):
        assert isinstance(before, PreferenceRecord)
        assert isinstance(after, PreferenceRecord)
        assert replace(after, origin=before.origin, unread=before.unread) == before


def sample(content: str, number: int = 0, tokens: int = 1, **facts: Any) -> Completion:
    return Completion(number, content, tokens, **{"finished": True, "same_ids": True} | facts)


@pytest.mark.parametrize("unfinished", DropOrKeep)
def test_samples_that_are_not_used_have_a_reason(unfinished: DropOrKeep) -> None:
    samples = [sample("a"), sample("a "), sample("a", fields={"reasoning_content": "t"}), sample(" ")]
    samples += [sample("b", finished=False), sample("c", same_ids=False)]
    found = joined_completions([Completions(samples)], unfinished)
    reason = None if unfinished is DropOrKeep.keep else "unfinished"
    assert [each.unused for each in found.completions] == [None, "identical", None, "empty", reason, None]


MODELS = [
    ModelSource(name, "pairs.models", Path(name), None, None, f"digest of {name}")
    for name in ("one", "other")
]
THOUGHT = {"reasoning_content": "I add."}
SCORES: list[list[float | None]] = [[3.0, 1.0, 1.0, None], [2.0] * 4, [4.0, 4.0]]


def finished(folder: Path) -> PairResults:
    source = jsonl(folder, *({"prompt": [user(f"question {n}")]} for n in range(3)))
    rule = PairsConfig(method=PairsMethod.samples, select=ALL, unfinished=DropOrKeep.keep)
    config = replace(load_run_config(["model.path=m", f"data.train=[{source}]"]), pairs=rule)
    run = Run(config, ALONE, Console(None))
    prompts = Prompts(run, folder, [different_prompts(config.data, config.pairs, lambda _: None)])
    rows = []
    for prompt in range(3):
        thoughts = [THOUGHT, {}] if prompt == 0 else [{}, {}]
        of_models = [
            Completions(
                [sample(f"{name}{n}", at + n, n + 1, fields=thoughts[n], finished=ends) for n in range(2)]
            )
            for name, at, ends in (("a", 0, True), ("b", 2, False))
        ]
        if prompt == 2:
            of_models[1] = Completions([], "too_long")
        rows.append(joined_completions(of_models, rule.unfinished))
    judge: Any = SimpleNamespace(judge=lambda _: [Judgement(own, Counter(unreadable=1)) for own in SCORES])
    scored = prompts.finish(
        "scores",
        prompts.stage("scores", {}),
        lambda _: list(map(asdict, score(prompts.parts[0], rows, judge))),
    )
    return PairResults(prompts, MODELS, scored, {"sampling": "facts"})


def test_scored_samples_have_their_origin_and_are_counted_and_read_again(tmp_path: Path) -> None:
    results = finished(tmp_path)
    pairs = list(pairs_from_results(results))
    a0 = [{"role": "assistant", "content": "a0", **THOUGHT}]
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [
        (a0, [{"role": "assistant", "content": "a1"}]),
        (a0, [{"role": "assistant", "content": "b0", **THOUGHT}]),
    ]
    assert {(row["score_chosen"], row["score_rejected"]) for row in pairs} == {(3.0, 1.0)}
    provenance = pairs[1]["provenance"]
    assert provenance["rejected"] == {
        "model": {"name": "other", "revision": None, "digest": "digest of other"},
        **{"number": 2, "tokens": 1, "finished": False},
    }
    assert provenance["source"].endswith("records.jsonl:1")
    assert (provenance["select"], provenance["sampling"]) == ("all_pairs", "facts")
    assert +results.counts == {
        **{"prompts": 3, "samples": 10, "unreadable": 3, "samples_without_score": 1},
        **{"tied_pairs": 1 + 6, "prompts_all_tied": 1, "prompts_dropped_too_long": 1},
        "samples_unfinished": 4,
    }
    found = list(scored_lists(results))
    assert [(len(row["responses"]), len(row["unused"])) for row in found] == [(3, 1), (4, 0), (2, 0)]
    assert found[0]["unused"][0]["content"] == "b1"
    assert found[2]["provenance"]["dropped"] == "too_long"
    (record,) = read_records(str(jsonl(tmp_path, found[0])))
    assert isinstance(record, PreferenceRecord)
    assert record.scores == (3.0, 1.0, 1.0)
    assert record.responses[0] == (Message("assistant", "a0", THOUGHT),)


def test_parts_of_prompts_share_none_and_together_are_all(tmp_path: Path) -> None:
    source = jsonl(tmp_path, *({"prompt": f"question {n % 50}", "completion": "c"} for n in range(60)))

    def asked(*overrides: str) -> list[str]:
        config = load_run_config(["model.path=m", f"data.train=[{source}]", *overrides])
        return [str(record.prompt) for record in different_prompts(config.data, config.pairs, lambda _: None)]

    whole = asked()
    parts = [asked(f"pairs.part={number}/3") for number in (1, 2, 3)]
    assert len(whole) == 50
    assert sorted(itertools.chain(*parts)) == sorted(whole)
    assert all(8 < len(part) < 25 for part in parts)
    assert asked("pairs.part=2/3", "pairs.limit=5") == parts[1][:5]


def prompts_of(folder: Path, parts: int, **world: Any) -> Prompts:
    run: Any = SimpleNamespace(world=SimpleNamespace(**world), console=Console(None))
    return Prompts(run, folder, [[]] * parts)


def stage(folder: Path, setting: str = "a", parts: int = 5) -> Parts:
    return prompts_of(folder, parts).stage("responses", {"setting": setting})


def work(parts: Parts, open_parts: list[int], rank: int, fails: int | None = None) -> list[int]:
    """Do the share of one of two processes, one after the other; return the parts begun."""
    world = {"rank": rank, "size": 2, "on_main": lambda *_: open_parts, "together": lambda work: work()}
    done = []

    def part(index: int) -> list[dict[str, Any]]:
        done.append(index)
        if index == fails:
            raise ConfigError("no memory")
        return number(index)

    with nullcontext() if fails is None else pytest.raises(ConfigError):
        prompts_of(parts.folder, 5, **world).finish("responses", parts, part)
    return done


def number(index: int) -> list[dict[str, Any]]:
    return [{"number": index, "text": "é\u2028"}]


def test_processes_share_the_open_parts_and_stop_at_the_error_of_another_one(tmp_path: Path) -> None:
    parts = stage(tmp_path)
    open_parts = parts.open()
    assert open_parts == [0, 1, 2, 3, 4]
    assert work(parts, open_parts, 1, fails=3) == [1, 3]
    assert work(parts, open_parts, 0) == []
    open_parts = parts.open()
    assert open_parts == stage(tmp_path).open() == [0, 2, 3, 4], "1 is finished"
    assert [work(parts, open_parts, rank) for rank in (0, 1)] == [[0, 3], [2, 4]]
    assert parts.open() == []
    assert [parts.read(index) for index in range(5)] == [number(index) for index in range(5)]
    assert stage(tmp_path, "b").open() == [0, 1, 2, 3, 4], "other settings have other parts"
    assert stage(tmp_path, parts=4).folder != parts.folder, "other prompts have other parts, too"


PROMPTS = [{"prompt": [user(f"question {n}")]} for n in range(3)]
SAMPLED = ("pairs.method=samples", "pairs.reward_model=r", "pairs.samples=2")
DELTA = ("pairs.method=delta", "pairs.models=[a/b,c/d]")
SERVER = "sampling.endpoint.url=http://h/v1"


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    return tmp_path


def config(*overrides: str) -> RunConfig:
    return load_run_config(["data.train=[records.jsonl]", "run.dir=run", "model.path=base", *overrides])


@pytest.mark.usefixtures("in_folder")
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["run.resume=must"], "run.resume has no effect"),
        ([*DELTA, "model.revision=x"], "model.revision has no effect"),
        ([*SAMPLED, "sampling.temperature=0"], "every sample of a model is the same"),
        ([*SAMPLED, "pairs.function=a:b"], "samples need one judge"),
        (["pairs.method=samples", "model.path=a/b", "pairs.endpoint.url=http://h/v1"], "model is not set"),
        ([*SAMPLED, "sampling.endpoint.parallel=2"], "no effect with this sampling.endpoint.url"),
        (["pairs.method=scores", SERVER], "sampling.endpoint.url has no effect"),
        ([*DELTA, SERVER, "sampling.endpoint.model=m"], "several models cannot be served under one name"),
        ([*SAMPLED, SERVER, "model.images={}"], "a server gets prompts as tokens, without images"),
        (["pairs.method=delta", "pairs.models=[a,./a]"], "two models"),
        (["pairs.rounds=1"], "rounds cannot be done"),
        (["pairs.rounds=1", *SAMPLED, "pairs.models=[other]"], "rounds cannot be done"),
        (["pairs.margin=1", "sampling.top_k=3", "pairs.reference=first"], "(?s)2 mistakes.*reference.*top_k"),
    ],
)
def test_an_option_without_effect_or_sense_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_pairs(config(*overrides))


@pytest.mark.usefixtures("in_folder")
def test_rounds_are_done_by_the_first_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[str]()
    monkeypatch.setattr(verb, "check_pairs", lambda _: None)
    monkeypatch.setattr(verb, "run_rounds", lambda *_: done.append(os.environ["RANK"]) or 0)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert verb.main(config(*SAMPLED, "pairs.rounds=1")) == 0
    assert done == ["0"]


def test_models_and_the_endpoint_are_checked(in_folder: Path) -> None:
    write_model(in_folder / "model")
    write_model(in_folder / "run" / "model")
    (in_folder / "run" / "config.yaml").touch()
    named = config("pairs.models=[model,run]")
    assert responding_models(named.pairs, named.model.path) == ["model", "run/model"]
    for reply in ("[[5]]", (400, "{}")):
        with judge_server(lambda *_, reply=reply: reply) as server:
            keys = ["pairs.method=samples", f"pairs.endpoint.url={server.url}", "pairs.endpoint.model=judge"]
            run = Run(config(*keys), ALONE, Console(None))
            if reply == "[[5]]":
                assert (
                    str(open_judge_together(run)[0])
                    == f"judge at {server.url}: each two responses in both positions"
                )
                assert len(server.bodies) == 1
                continue
            with pytest.raises(ConfigError, match="harmless request"):  # before responses are generated
                open_judge_together(run)


def test_more_bad_records_than_pairs_accepts_are_an_error(in_folder: Path) -> None:
    jsonl(in_folder, *[SCORED] * 9, {"no": "prompt"})
    with pytest.raises(DataError, match="10 records"):
        list(training_records(config().data, DataSource.records, print))
