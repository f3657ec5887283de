"""The doctor counts planted faults, raises no alarm on clean data, and encodes as training does."""

import contextlib
import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.config.losses import LossConfig, LossKind
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.config import DataConfig, SourceConfig
from dpo_dist.encoded import workers
from dpo_dist.foundation.errors import ConfigError, DataError
from dpo_dist.tools.doctor.examine import Diagnosis, diagnose, examine
from dpo_dist.tools.doctor.rules import DOCTOR_RULES, RULE_BY_KIND
from dpo_dist.tools.findings import Level
from dpo_dist.training.start.prepared_data import prepare_data
from tests.support import tiny
from tests.support.doctor_data import (
    Pair,
    alarms,
    as_messages,
    clean_pairs,
    examined,
    lines,
    of_rule,
    write,
)
from tests.support.invented import write_pairs
from tests.support.records import TEXT, assistant, jsonl, user
from tests.support.sft_adapter import write_sft_adapter
from tests.support.shared_data import shared_data_dir
from tests.support.tiny_model import write_model

pytestmark = pytest.mark.slow

SHARED = shared_data_dir()
Plant = Callable[[Pair], object]
QUESTION = "one two three four five six seven eight nine"


def as_labelled(pairs: Sequence[Pair], mark: str = "") -> list[dict[str, object]]:
    """Return one response of each pair, good and bad by turns; the good ones start with `mark`."""
    return [
        {"prompt": pair["prompt"], "completion": mark * is_good + pair["chosen"], "label": is_good}
        for pair, is_good in zip(pairs, itertools.cycle((True, False)), strict=False)
    ]


def side(name: str, change: Callable[[str], str]) -> Plant:
    return lambda pair: pair.update({name: change(pair[name])})


def calling(name: str, arguments: object, **changes: object) -> Pair:
    """Return what makes of a pair's chosen response a call, and of its rejected one a text."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {
        "tools": [WEATHER],
        "prompt": [user("how is the weather in Paris")],
        "chosen": [{"role": "assistant", "content": "", "tool_calls": [call]}],
        "rejected": [assistant("I can not know that.")],
        **changes,
    }


PLANTED: dict[str, Plant] = {
    "replacement_character": side("chosen", lambda text: text + "\ufffd"),
    "control_character": side("rejected", lambda text: "\x07" + text),
    "zero_width_character": side("prompt", lambda text: text.replace(" ", "\u200b ", 1)),
    "bidi_control": side("chosen", lambda text: "\u202e" + text),
    "unassigned_character": side("chosen", lambda text: text + "\ue000"),
    "wrong_decoding": side("rejected", lambda text: text + " caf\u00c3\u00a9"),
    "carriage_return": side("chosen", lambda text: text.replace(" ", "\r\n", 1)),
    "html_entity": side("chosen", lambda text: text.replace(" ", " &amp; ", 1)),
    "escaped_newline": side("chosen", lambda text: text.replace(" ", "\\n\\n", 1)),
    "template_mark": side("rejected", lambda text: text + "</s> more"),
    "role_mark": side("rejected", lambda text: text + " Human: more"),
    "response_starts_with_prompt": lambda pair: pair.update(chosen=f"{pair['prompt']} {pair['chosen']}"),
    "score_ties": lambda pair: pair.update(score_chosen=4.0, score_rejected=4.0),
    "score_inversions": lambda pair: pair.update(score_chosen=3.0, score_rejected=4.0),
    "looping_response": side("chosen", lambda text: text + " so it goes on and on" * 20),
    "thought_not_closed": side("chosen", lambda text: "<think>\nI do not know. " + text),
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def test_planted_faults_are_counted_and_located(tmp_path: Path) -> None:
    pairs = clean_pairs(10 + 2 * len(PLANTED))
    for pair in pairs:
        pair.update(score_chosen=4.0, score_rejected=3.0)
    for number, plant in enumerate(PLANTED.values()):
        plant(pairs[2 * number])
        plant(pairs[2 * number + 1])
    report = examined(tmp_path, pairs, config={"text_as_messages": False})
    for name in PLANTED:
        rule = RULE_BY_KIND.get(name, name)
        [finding] = of_rule(report, rule)
        same = [2 * other for other, one in enumerate(PLANTED) if RULE_BY_KIND.get(one, one) == rule]
        assert lines(finding) == sorted(line for first in same for line in (first + 1, first + 2)), name
        assert (finding.count, finding.source) == (2 * len(same), f"{tmp_path.name}-train")
        assert name not in RULE_BY_KIND or f"{name.replace('_', ' ')} in 2" in finding.text


LOOP = "so it goes on and on " * 20


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        # What is taught is looked at: a rejected response may be rejected for its fault.
        (TEXT | {"rejected": LOOP}, ""),
        (TEXT | {"rejected": f"<think>{LOOP}"}, ""),
        ({"prompt": "q", "completion": LOOP, "label": False}, ""),
        ({"prompt": "q", "completion": LOOP, "label": True}, "looping response"),
        # The second half alone; a passage of a third; a short answer.
        (
            TEXT | {"chosen": QUESTION + " and what comes after these words is more of it. " + LOOP},
            "looping response",
        ),
        (TEXT | {"chosen": f"{QUESTION} {' '.join(map(str, range(40)))} {QUESTION}"}, ""),
        (TEXT | {"chosen": "ha ha ha ha ha"}, ""),
        (TEXT | {"chosen": "\u54c8" * 40}, "looping response"),
        # Thoughts.
        (TEXT | {"chosen": "<think>a thought</think>an answer"}, ""),
        (TEXT | {"chosen": "a thought that the template opened</think>an answer"}, ""),
        (TEXT | {"chosen": "write `<think>` before a thought"}, ""),
        (TEXT | {"chosen": "<think>one</think>\n<think>two, and no answer"}, "thought not closed"),
        (TEXT | {"chosen": "[THINK]no answer"}, "thought not closed"),
    ],
)
def test_faults_of_what_is_taught(record: Pair, kind: str, tmp_path: Path) -> None:
    found = of_rule(examined(tmp_path, [record]), "broken_response")
    assert [finding.text.rpartition(": ")[2] for finding in found] == ([f"{kind} in 1"] if kind else [])


def test_a_call_against_a_text_is_the_preference_itself_and_no_leak(tmp_path: Path) -> None:
    pairs = clean_pairs(200)
    calls = [
        calling(
            "weather",
            {"city": pair["chosen"]},
            prompt=[user(pair["prompt"])],
            rejected=[assistant(pair["rejected"])],
        )
        for pair in pairs
    ]
    report = examined(tmp_path, calls)
    assert alarms(report) == []
    assert report.sources[0]["leaks"] == []
    # Both sides call, and the form of an argument reveals the chosen one; texts beside calls are tested.
    both = [call | {"rejected": calling("weather", {"city": "Rome"})["chosen"]} for call in calls]
    assert of_rule(examined(tmp_path, both), "length_bias")
    texts = [as_messages(pair | {"chosen": "Sure: " + pair["chosen"]}) for pair in pairs]
    [leak] = of_rule(examined(tmp_path, [*calls, *texts]), "label_leak")
    assert "Sure" in leak.text
    # Labelled calls are good, labelled texts bad.
    labelled = [
        {"prompt": call["prompt"], "tools": [WEATHER], "completion": call[name], "label": name == "chosen"}
        for call, name in zip(calls, itertools.cycle(("chosen", "rejected")), strict=False)
    ]
    assert alarms(examined(tmp_path, labelled)) == []


@pytest.mark.parametrize(("count", "seed"), [(12, 0), (300, 3)])
def test_clean_pairs_raise_no_alarm(count: int, seed: int, tmp_path: Path) -> None:
    assert alarms(examined(tmp_path, clean_pairs(count, seed), clean_pairs(20, 99))) == []


def test_sources_of_one_name_are_told_apart_by_their_use(tmp_path: Path) -> None:
    paths = []
    for name in ("train", "eval"):
        (tmp_path / name).mkdir()
        paths.append(write(tmp_path / name / "pairs.jsonl", clean_pairs(3)))
    train, evaluation = (SourceConfig(path=path) for path in paths)
    report = examine(DataConfig(train=[train], eval=[evaluation]), None)
    assert [source["label"] for source in report.sources] == ["pairs", "pairs (eval)"]


def test_a_finding_up_to_the_threshold_is_a_note() -> None:
    for count, level in ((1, Level.note), (2, Level.warning)):
        assert [one.level for one in DOCTOR_RULES["dropped"].count(count, 100, "a")] == [level]
    assert [len(list(DOCTOR_RULES["label_leak"].value(share, 100, "a", ""))) for share in (0.65, 0.66)] == [
        0,
        1,
    ]


def test_plain_text_beside_a_chat_template_is_a_warning_from_the_first_record_on(tmp_path: Path) -> None:
    records = clean_pairs(60)
    for setting, levels in ((False, [(Level.warning, 60)]), ("auto", []), (True, [])):
        report = examined(tmp_path, records, tokenizer=tiny.qwen(), config={"text_as_messages": setting})
        found = of_rule(report, "plain_text")
        assert [(finding.level, finding.count) for finding in found] == levels


def test_copies_and_contradictions_are_found_within_a_source_and_across(tmp_path: Path) -> None:
    pairs = clean_pairs(30)
    swapped = pairs[3] | {"chosen": pairs[3]["rejected"], "rejected": pairs[3]["chosen"].upper()}
    first, second = [*pairs, pairs[5]], [*clean_pairs(10, 1), pairs[9], swapped]
    files = [write(tmp_path / f"{name}.jsonl", records) for name, records in (("a", first), ("b", second))]
    config = DataConfig(train=[SourceConfig(path=file) for file in files])
    report = examine(config, None)
    found = {
        (one.rule, one.source and Path(one.source).stem): one.count
        for one in report.findings
        if one.rule in ("duplicates", "contradictions")
    }
    assert found == {("duplicates", None): 2, ("contradictions", None): 2}
    [copies] = of_rule(report, "duplicates")
    assert copies.examples == (f"{files[0]}:31, {files[0]}:6", f"{files[1]}:11, {files[0]}:10")
    assert copies.text.endswith("1 in a, 1 in b")
    assert report.across["contradictions"] == 2


def test_copies_in_the_evaluation_data_are_leaks_and_no_duplicates(tmp_path: Path) -> None:
    pairs = clean_pairs(40)
    report = examined(tmp_path, pairs[:30], [*pairs[:1], *pairs[30:]], config={"drop_eval_prompts": True})
    assert not of_rule(report, "duplicates")
    [leak] = of_rule(report, "train_eval_leak")
    assert (leak.count, leak.level, leak.remedy) == (1, Level.note, "none is needed")


@pytest.mark.parametrize(("bad", "is_refused"), [(5, False), (6, True)])
def test_the_share_of_dropped_records_is_one_of_all_that_were_read(
    bad: int, is_refused: bool, tmp_path: Path
) -> None:
    report = examined(tmp_path, [*clean_pairs(100 - bad), *[{"prompt": "q"}] * bad])
    assert bool(of_rule(report, "training_refuses")) == is_refused


def test_a_response_that_a_ranking_repeats_contradicts_no_record(tmp_path: Path) -> None:
    opposite = {"prompt": "Name a colour.", "responses": ["Grey.", "Blue."], "scores": [2, 1]}
    for added, count in (([], 0), (["Grey."], 2)):
        responses = ["Red it is.", "Blue.", "RED it is.", *added]
        scores = list(range(len(responses), 0, -1))
        ranking = {"prompt": "Name a colour.", "responses": responses, "scores": scores}
        assert examined(tmp_path, [ranking, opposite]).across["contradictions"] == count


def test_prompts_of_scorers_have_lengths_of_their_own(tmp_path: Path) -> None:
    pairs = clean_pairs(40)
    for pair in pairs[:15]:
        pair["teacher_prompt"] = "sea " * 50 + pair["prompt"]
    [source] = examined(tmp_path, pairs, tokenizer=tiny.qwen(), config={"max_length": 4000}).sources
    teacher, own = (source["sides"][name]["tokens"] for name in ("teacher_prompt", "prompt"))
    assert (teacher["count"], own["count"]) == (15, 40)
    assert teacher["smallest"] > own["smallest"] + 50
    assert "reference_prompt" not in source["sides"]


def test_lengths_are_those_before_the_cut(tmp_path: Path) -> None:
    pairs, tokenizer = clean_pairs(40), tiny.qwen()
    [whole] = examined(tmp_path, pairs, tokenizer=tokenizer, config={"max_length": 4000}).sources
    cut = examined(tmp_path, pairs, tokenizer=tokenizer, config={"max_length": 200})
    sides = cut.sources[0]["sides"]
    for name, of_side in sides.items():
        assert of_side["tokens"] == whole["sides"][name]["tokens"]
        assert of_side["tokens"]["count"] == 40
    assert (whole["sides"]["chosen"]["cut"], sides["prompt"]["cut"]) == (0, 0)
    assert sides["chosen"]["cut_tokens"] > sides["chosen"]["cut"] > 0
    [finding] = of_rule(cut, "truncated")
    assert "response truncated in" in finding.text


def test_a_template_that_writes_bos_twice_is_a_finding(tmp_path: Path) -> None:
    records = list(map(as_messages, clean_pairs(5)))
    tokenizer = tiny.with_template(tiny.llama3(), "{{ bos_token }}" + tiny.LLAMA3)
    [finding] = of_rule(examined(tmp_path, records, tokenizer=tokenizer), "chat_template")
    assert (finding.level, finding.count) == (Level.warning, 5)
    assert "doubled bos in 5" in finding.text
    assert not of_rule(examined(tmp_path, records, tokenizer=tiny.llama3()), "chat_template")


def test_tools_that_the_template_does_not_render_are_a_finding(tmp_path: Path) -> None:
    parameters = {"type": "object", "properties": {}}
    records = list(map(as_messages, clean_pairs(20)))
    records[2]["tools"] = [{"type": "function", "function": {"name": "look", "parameters": parameters}}]
    report = examined(tmp_path, records, tokenizer=tiny.qwen())
    assert lines(of_rule(report, "chat_template")[0]) == [3]
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + tiny.CHATML
    report = examined(tmp_path, records, tokenizer=tiny.with_template(tiny.qwen(), template))
    assert not of_rule(report, "chat_template")


def test_the_report_does_not_depend_on_the_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(train=[SourceConfig(path=write(tmp_path / "train.jsonl", clean_pairs(70)))])
    reports = []
    for processes in (1, 2):
        monkeypatch.setattr(workers, "processes_for", lambda _, count=processes: count)
        reports.append(examine(data, None))
    assert reports[0] == reports[1]


def test_evaluation_prompts_in_the_training_data_are_found(tmp_path: Path) -> None:
    train, held_out = clean_pairs(50), clean_pairs(20, 7)
    held_out[0]["prompt"] = "  " + train[11]["prompt"].upper()
    held_out[3]["prompt"] = train[7]["prompt"][:3] + "\u200b" + train[7]["prompt"][3:]
    report = examined(tmp_path, train, held_out)
    [exact] = of_rule(report, "train_eval_leak")
    of_train = tmp_path / "train.jsonl"
    assert (exact.level, exact.count, lines(exact)) == (Level.error, 1, [4])
    assert exact.examples[0].endswith(f", {of_train}:8")


# Findings with their records, each counted by a plain script too; then those above a note.
RANKED = {"prompt": "instruction|turn", "history": "history", "responses": "output", "best_first": True}
INNER = {side: f"record.{side}|default(none)" for side in ("prompt", "chosen", "rejected")}
FINDINGS: dict[str, tuple[str, str]] = {
    "hh_rlhf_sample.jsonl": (
        "broken_response 1, dropped 9, markup_in_text 45",
        "markup_in_text",
    ),
    "llama_factory_sharegpt_zh.json": (
        "broken_text 8, duplicates 11, markup_in_text 1",
        "broken_text, duplicates",
    ),
    "ultrafeedback_plain_scored.jsonl": (
        "broken_text 7, dropped 7, markup_in_text 7, scores 30",
        "broken_text, dropped, markup_in_text, scores",
    ),
    "ranked_oasst_history_zh.json": (
        "broken_response 6, dropped 6, length_bias 244, markup_in_text 1",
        "broken_response, dropped, length_bias",
    ),
    "orca_system_question.csv": (
        "label_leak 60, length_bias 60",
        "label_leak, length_bias",
    ),
    "templated_near_duplicates.jsonl": ("length_bias 40", "length_bias"),
}


@pytest.mark.skipif(SHARED is None, reason="needs the slices of real data")
@pytest.mark.parametrize("name", FINDINGS)
def test_the_findings_about_real_data_are_the_known_ones_and_quote_no_text(name: str) -> None:
    assert SHARED is not None
    file, counts = SHARED / name, Counter[str]()
    fields = {"ranked_": RANKED, "bad_rec": INNER}.get(name[:7])
    source = SourceConfig(path=str(file), fields=fields, ignore=["*"] if fields else None)
    report = examine(DataConfig(train=[source]), None)
    for finding in report.findings:
        counts[finding.rule] += finding.count
    alarms = {finding.rule for finding in report.findings if finding.level is not Level.note}
    shown = ", ".join(f"{rule} {count}" for rule, count in sorted(counts.items()))
    assert (shown, ", ".join(sorted(alarms))) == FINDINGS[name]
    texts = re.findall(r'"((?:[^"\\]|\\.){31,})"', file.read_text(encoding="utf-8"))
    written = json.dumps(asdict(report), ensure_ascii=False)
    assert len(texts) > 50
    assert str(file) in written
    assert not [text for text in texts if text.strip()[:30] in written]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def run_of(folder: Path, *train: str | Path, **data: Any) -> RunConfig:
    sources = [SourceConfig(str(path)) for path in train]
    return RunConfig(data=DataConfig(train=sources, cache=str(folder / "encoded"), **data))


def prepared(config: RunConfig, model: Path) -> tuple[list[list[int]], list[Any]]:
    of_model = replace(config.model, path=str(model))
    encoded = prepare_data(
        config.data, of_model, config.loss, lambda *_: contextlib.nullcontext(lambda *_: None)
    )
    return [list(map(len, of_source)) for of_source in encoded.datasets], encoded.refusals


def test_data_with_bad_records_are_encoded_and_refused(tmp_path: Path, model: Path) -> None:
    good = write_pairs(tmp_path / "good.jsonl", 5)
    bad = jsonl(tmp_path, *[TEXT | {"chosen": ""}] * 3, TEXT)
    datasets, [refusal] = prepared(run_of(tmp_path, good, bad), model)
    assert (datasets, type(refusal)) == ([[5], [1]], DataError)
    assert refusal.message == "3 of 4 records cannot be used"
    assert f"{bad}:1" in refusal.where
    datasets, [_] = prepared(run_of(tmp_path, jsonl(tmp_path, TEXT | {"chosen": ""})), model)
    assert datasets == [[]]


def test_data_that_loss_or_model_cannot_use_are_refused(tmp_path: Path, model: Path) -> None:
    config = run_of(tmp_path, jsonl(tmp_path, {"prompt": "q", "completion": "a"}))
    [refusal] = prepared(config, model)[1]
    assert refusal.remedy.startswith("set loss=sft")
    sft = replace(config, loss=LossConfig(LossKind.sft))
    assert prepared(sft, model)[1] == []
    described = json.loads((model / "config.json").read_text())
    small = Path(shutil.copytree(model, tmp_path / "small"))
    (small / "config.json").write_text(json.dumps(described | {"vocab_size": 2}))
    [refusal] = prepared(sft, small)[1]
    assert isinstance(refusal, ConfigError)


def test_data_are_encoded_by_the_tokenizer_of_the_adapter_that_the_policy_starts_from(tmp_path: Path) -> None:
    """As training encodes them: the base has no chat template, the adapter's folder has one."""
    tokenizer = tiny.qwen()
    model, sft = write_model(tmp_path / "base", tokenizer), tmp_path / "sft"
    write_sft_adapter(model, sft)
    tokenizer.save_pretrained(sft)
    (model / "chat_template.jinja").unlink()
    data = write(tmp_path / "a.jsonl", map(as_messages, clean_pairs(3)))
    keys = [f"model.path={model}", f"data.train=[{data}]", f"data.cache={tmp_path}/encoded"]

    def diagnosed(*more: str) -> Diagnosis:
        return diagnose(
            load_run_config([*keys, *more]), lambda *_: contextlib.nullcontext(lambda *_, **__: None)
        )

    assert diagnosed(f"model.adapter={{path: {sft}}}").model == sft
    with pytest.raises(ConfigError, match="no chat template") as raised:
        diagnosed()
    assert "text_as_messages" not in raised.value.remedy  # it is off


def test_labelled_responses_are_compared_good_with_bad(tmp_path: Path) -> None:
    clean = as_labelled(clean_pairs(400))
    report = examined(tmp_path, clean)
    assert not alarms(report)
    source = report.sources[0]
    assert source["labels"] == {"good": 200, "bad": 200}
    assert [source["sides"][name]["characters"]["count"] for name in ("chosen", "rejected")] == [200, 200]
    assert source["leaks"][0]["pairs"] == 200
    [leak] = of_rule(examined(tmp_path, as_labelled(clean_pairs(400), "Sure: ")), "label_leak")
    assert "Sure" in leak.text
    both = [*clean, *(record | {"label": not record["label"]} for record in clean[:4])]
    report = examined(tmp_path, both)
    [contradiction] = of_rule(report, "contradictions")
    assert (contradiction.count, contradiction.level) == (8, Level.error)
    assert not of_rule(report, "duplicates")


@pytest.mark.parametrize(
    ("weights", "bad", "level", "remedy"),
    [
        ([], 1, Level.warning, "set loss.undesirable_weight=16.3"),
        (["loss.undesirable_weight=16"], 1, None, ""),
        (["loss.desirable_weight=2"], 1, Level.warning, "set loss.undesirable_weight=32.6"),
        ([], 0, Level.warning, "add responses of the other label"),
    ],
)
def test_labels_that_do_not_weigh_alike_are_a_finding_with_the_weight_that_they_need(
    tmp_path: Path, weights: list[str], bad: int, level: Level | None, remedy: str
) -> None:
    records = [
        {"prompt": pair["prompt"], "completion": pair["chosen"], "label": number >= bad}
        for number, pair in enumerate(clean_pairs(20))
    ]
    config = load_run_config(
        [f"data.train=[{write(tmp_path / 'data.jsonl', records)}]", "loss=kto", *weights]
    )
    found = of_rule(diagnose(config, lambda *_: contextlib.nullcontext(lambda *_: None)), "label_balance")
    assert [(finding.level, finding.remedy) for finding in found] == ([(level, remedy)] if level else [])


def test_labels_count_as_often_as_their_source_is_drawn(tmp_path: Path) -> None:
    records = [
        {"prompt": pair["prompt"], "completion": pair["chosen"], "label": number > 0}
        for number, pair in enumerate(clean_pairs(20))
    ]
    [bad, *good] = records
    bad = write(tmp_path / "bad.jsonl", [bad])
    good = write(tmp_path / "good.jsonl", good)
    for of_bad, of_good, count in ((1, 1, 1), (16, 1, 0), (1, 0.0625, 0)):
        sources = f"data.train=[{{path: {bad}, weight: {of_bad}}}, {{path: {good}, weight: {of_good}}}]"
        config = load_run_config([sources, "loss=kto"])
        found = diagnose(config, lambda *_: contextlib.nullcontext(lambda *_: None))
        assert len(of_rule(found, "label_balance")) == count
