"""Tools on records with images: the model sees them, and whoever judges or reads sees them too."""

import base64
import io
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForMultimodalLM

from dpo_dist.config.schema import Dtype, ImagesConfig, ModelConfig
from dpo_dist.data.config import DataConfig, SourceConfig
from dpo_dist.data.formats import read_records
from dpo_dist.data.images import ImageProcessor
from dpo_dist.data.records import PreferenceRecord
from dpo_dist.encoded.build import Preparation
from dpo_dist.encoded.dataset import PreferenceDataset, open_dataset
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.kit import packed_logps
from dpo_dist.model.files.load import load_packed
from dpo_dist.reference.model_source import find_model
from dpo_dist.tools.chat.conversation import open_conversation
from dpo_dist.tools.doctor.examine import examine
from dpo_dist.tools.doctor.folder import DoctorFolder
from dpo_dist.tools.doctor.measures.observe import Observer
from dpo_dist.tools.doctor.page import write_doctor_page
from dpo_dist.tools.doctor.shown_pairs import show_pairs
from dpo_dist.tools.findings import Finding, Level
from dpo_dist.tools.pages.blocks import Answers
from dpo_dist.tools.pairs.make_pairs import pairs_from_scores
from dpo_dist.tools.pairs.people import Labelling, draw_items
from dpo_dist.tools.report.samples import choose_prompts
from dpo_dist.tools.sampling import judges
from dpo_dist.tools.sampling.judges import EndpointJudge, FunctionJudge, Question, RewardModel
from dpo_dist.tools.sampling.keys import EndpointConfig, PairsConfig, PairsMethod
from dpo_dist.tools.sampling.prompts import good_records
from dpo_dist.tools.sampling.respond import open_generator, open_responder, respond
from dpo_dist.tools.sampling.settings import Sampling
from tests.support.image_model import image_pair, write_image_model, write_pictures
from tests.support.image_processors import image_tokenizer
from tests.support.invented_images import row_logps
from tests.support.judge_server import judge_server
from tests.support.records import jsonl
from tests.support.tiny_model import write_model

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
GREEDY = Sampling(6, temperature=0)
TOKENIZER = image_tokenizer("qwen2_5_vl")
PAD = "<|image_pad|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in `model`, and `pictures.jsonl`."""
    path = tmp_path_factory.mktemp("images")
    write_image_model(path / "model")
    write_pictures(path)
    return path


def model_config(folder: Path) -> ModelConfig:
    return ModelConfig(str(folder / "model"), dtype=Dtype.fp32, images=ImagesConfig())


def records(folder: Path, name: str = "pictures.jsonl") -> list[Any]:
    return list(read_records(str(folder / name)))


def colours(*files: bytes) -> list[Any]:
    return [Image.open(io.BytesIO(file)).convert("RGB").getpixel((2, 2)) for file in files]


def encoded(folder: Path) -> PreferenceDataset:
    config, source = DataConfig(cache=str(folder / "encoded")), SourceConfig(str(folder / "pictures.jsonl"))
    processor = ImageProcessor(folder / "model", TOKENIZER)
    sources = Preparation([source], config, TOKENIZER, "toy", processor=processor).whole()
    return open_dataset(sources, config, processor)


def test_responses_depend_on_the_image_alone_and_log_probs_are_those_of_the_whole_model(folder: Path) -> None:
    config = model_config(folder)
    source = find_model(str(folder / "model"), config, folder / "store", "model.path")
    responder, generate = open_generator(source, config, DataConfig(), CPU)
    rows = respond(records(folder), responder, generate, GREEDY, range(1))
    assert len({tuple(row.completions[0].ids) for row in rows}) == 3
    data = encoded(folder)
    examples = [
        replace(
            each,
            prompt_ids=np.array(row.prompt_ids, np.int32),
            responses=(np.array(row.completions[0].ids, np.int32),),
        )
        for row, each in zip(rows, data.with_inputs([data.example(n) for n in range(3)]), strict=True)
    ]
    packed = load_packed(folder / "model", config, 256, CPU).eval()
    with torch.no_grad():
        plain = row_logps(AutoModelForMultimodalLM.from_pretrained(folder / "model"), examples)
    wanted = [float(part.sum()) for part in plain.split([len(each.responses[0]) for each in examples])]
    found = [float(logps.detach().sum()) for logps in packed_logps(packed, examples, 10**6)]
    assert found == pytest.approx(wanted, abs=1e-4)


def test_a_model_of_text_is_refused_and_without_the_key_records_with_images_are_dropped(
    folder: Path, tmp_path: Path
) -> None:
    text = ModelConfig(str(write_model(tmp_path / "text")), images=ImagesConfig())
    source = find_model(text.path, text, tmp_path, "compare.models")
    with pytest.raises(ConfigError, match="images cannot be processed"):
        open_responder(source, text, DataConfig())
    config = replace(model_config(folder), images=None)
    source = find_model(config.path, config, tmp_path, "model.path")
    responder, generate = open_generator(source, config, DataConfig(), CPU)
    rows = respond(records(folder), responder, generate, GREEDY, range(1))
    assert [row.dropped for row in rows] == ["media_not_read"] * 3


def test_samples_show_one_mark_and_a_thumbnail_for_an_image_that_the_model_reads_whole(folder: Path) -> None:
    stops = frozenset({TOKENIZER.eos_token_id})
    prompts = choose_prompts(encoded(folder), TOKENIZER, stops, 9, 0, GREEDY, None)
    assert {prompt.fields["chosen"] for prompt in prompts} == {"It is red.", "It is green.", "It is blue."}
    for prompt in prompts:
        request, fields = prompt.request, prompt.fields
        [image], [thumbnail] = request.images, fields["images"]
        pads = int((request.prompt_ids == TOKENIZER.convert_tokens_to_ids(PAD)).sum())
        assert fields["prompt"].count(PAD) == 1 < pads == image.tokens
        shown = TOKENIZER.decode(request.prompt_ids.tolist()).replace(PAD * pads, PAD)
        assert fields["prompt"] == shown
        [(red, green, blue)] = colours(base64.b64decode(thumbnail.partition(",")[2]))
        named = {"It is red.": red, "It is green.": green, "It is blue.": blue}
        assert named[fields["chosen"]] == max(red, green, blue)


def test_a_function_gets_files_an_endpoint_uris_and_a_reward_model_refuses(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [red, _, blue], seen = records(folder), []

    def judged(prompt: Any, responses: list[str]) -> list[float]:
        seen.append(prompt)
        return [float(len(response)) for response in responses]

    monkeypatch.setattr(judges, "user_function", lambda *_: judged)
    function = FunctionJudge("tests.support.own_judge:letter_shares")
    assert function.judge([Question(blue, ("a", "bc"))])[0].scores == [1.0, 2.0]
    [[turn]] = seen
    image, question = turn["content"]
    assert colours(image["image"]) == [(0, 0, 255)]
    assert question == {"type": "text", "text": "What is it?"}
    with judge_server(lambda _: "[[7]]") as server:
        endpoint = EndpointJudge(EndpointConfig(url=server.url, model="m", verdicts="grade"))
        assert endpoint.judge([Question(red, ("a",))])[0].scores == [7.0]
    [_, message] = server.bodies[-1]["messages"]
    text, picture = message["content"]
    assert json.loads(text["text"])["conversation"][0]["content"][0] == {"type": "image"}
    kind, _, content = picture["image_url"]["url"].partition(",")
    assert kind == "data:image/jpeg;base64"
    assert colours(base64.b64decode(content)) == [(254, 0, 0)]
    model = RewardModel(str(folder), model_config(folder), tmp_path, CPU)
    with pytest.raises(ConfigError, match="cannot read images"):
        model.judge([Question(red, ("a",))])


def test_pairs_of_scored_records_keep_their_images_beside_them(folder: Path, tmp_path: Path) -> None:
    scored = [
        image_pair(f"{name} one.png", "yes", "no") | {"score_chosen": 1, "score_rejected": 3}
        for name in ("red", "blue", "red")
    ]
    (folder / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    data = DataConfig(train=[SourceConfig(str(folder / "scored.jsonl"))])
    said: list[str] = []
    pairs_from_scores(tmp_path / "pairs.jsonl", data, PairsConfig(method=PairsMethod.scores), 0, said.append)
    found = list(read_records(str(tmp_path / "pairs.jsonl")))
    assert all(isinstance(record, PreferenceRecord) for record in found)
    assert colours(*(image.read() for record in found for image in record.images)) == [
        *((255, 0, 0), (0, 0, 255), (255, 0, 0))
    ]
    assert len(list((tmp_path / "images").iterdir())) == 2
    assert [record.prompt for record in found] == [record.prompt for record in records(folder)]


def test_people_compare_responses_beside_the_image(folder: Path) -> None:
    same = [image_pair(f"{name} one.png", "yes", "no") for name in ("red", "blue")]
    (folder / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in same))
    given = [each for each in read_records(str(folder / "same.jsonl")) if isinstance(each, PreferenceRecord)]
    items = draw_items(given, 9, 0, (counts := Counter()))
    assert len(items) == 2
    assert not counts["duplicate"]
    shown = [Labelling(items, 0, 0).shown("ann", key) for key in items]
    answers = [block for _, blocks in shown for block in blocks if isinstance(block, Answers)]
    assert [each.prompt for each in answers] == [[("user", "role"), ("[image]What is it?", "")]] * 2
    files = [base64.b64decode((image or "").partition(",")[2]) for each in answers for image in each.images]
    assert sorted(colours(*files)) == [(0, 0, 254), (254, 0, 0)]


@pytest.mark.parametrize("is_encoded", [True, False])
def test_the_doctor_tells_records_apart_by_their_images(
    folder: Path, tmp_path: Path, is_encoded: bool
) -> None:
    names = ["red", "green", "blue", "red"]
    rows = [image_pair(f"{name} one.png", "A good answer to it.", "A bad one.") for name in names]
    rows.append(image_pair("broken.png", "yes", "no"))
    (folder / "broken.png").write_bytes(b"<html>")
    (folder / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(train=[SourceConfig(str(folder / "many.jsonl"))])
    processor = ImageProcessor(folder / "model", TOKENIZER) if is_encoded else None
    tokenizer = TOKENIZER if is_encoded else None
    found = examine(data, tokenizer, processor=processor)
    report = found.sources[0]
    assert report["dropped"]["image_unreadable"]["count"] == 1
    assert (found.across["duplicates"], found.across["repeated_prompts"]) == (1, 1)
    facts = Observer(data, tokenizer, processor=processor).observe(records(folder, "many.jsonl"))
    assert len({each.hash for each in facts[:4]}) == 3, "eval_share takes no two images for one"
    rules = {finding.rule for finding in found.findings}
    assert "duplicates" in rules
    assert rules.isdisjoint({"contradictions", "broken_text"})
    examples = (f"{folder}/many.jsonl:{line}" for line in range(1, len(rows) + 1))
    of_each = [Finding("rule", Level.note, "text", examples=(example,)) for example in examples]
    pairs = show_pairs(data, tokenizer, of_each, processor)
    texts = ["".join(text for text, _ in pair.prompt) for pair in pairs]
    marks = [text.count(PAD if is_encoded else "[image]") for text in texts]
    assert [count for count, pair in zip(marks, pairs, strict=True) if "dropped" not in pair.notes] == [
        1
    ] * len(rows[is_encoded:])
    assert sum(uri is not None for pair in pairs for uri in pair.images) == 4
    run = DoctorFolder(tmp_path)
    write_doctor_page(run, replace(found, shown=pairs))
    page = run.doctor_page.read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == page.count("<img") == 4


def test_the_doctor_finds_tags_that_are_no_places(folder: Path) -> None:
    beside = image_pair("red one.png", "A good answer.", "A bad one.")
    beside["prompt"][0]["content"].append({"type": "text", "text": "<image>"})
    sides = {"chosen": "good", "rejected": "bad", "image_path": "red one.png"}
    missing = {"prompt": [{"role": "user", "content": "<image>?"}], **sides}
    file = jsonl(folder, beside, missing)
    data = DataConfig(train=[SourceConfig(file)], max_bad_share=0.5)
    processor = ImageProcessor(folder / "model", TOKENIZER)
    found = {finding.rule: finding.text for finding in examine(data, TOKENIZER, processor=processor).findings}
    assert "image tag in text in 1" in found["markup_in_text"]
    assert "image_count (a tag of images, and no image)" in found["dropped"]


def test_verbs_read_records_with_images_and_drop_those_whose_file_is_missing(folder: Path) -> None:
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}, image_pair("red one.png", "a", "b")]
    rows.append(image_pair("no.png", "a", "b"))
    (folder / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, said = SourceConfig(str(folder / "some.jsonl")), list[str]()
    kept = list(good_records(read_records(source), source, DataConfig(max_bad_share=0.5), said.append))
    assert [len(record.images) for record in kept] == [0, 1]
    assert "image_unreadable" in said[1]


def test_images_for_a_chat_are_read_or_one_line_says_why_not(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    conversation = open_conversation(str(folder / "model"), said.append)
    (folder / "broken.png").write_bytes(b"<html>")
    paths = f"'{folder}/red one.png' {folder}/none.png {folder}/broken.png {folder} '{folder}/blue one.png'"
    found = conversation.open_images(paths)
    assert colours(*(image.read() for image in found)) == [(255, 0, 0), (0, 0, 255)]
    named = [f"{folder}/none.png", f"{folder}/broken.png", str(folder)]
    assert [line.partition(": ")[0] for line in said] == named
    broken = shutil.copytree(folder / "model", tmp_path / "broken")
    (broken / "preprocessor_config.json").write_text('{"image_processor_type": "Unknown"}')
    open_conversation(str(broken), said.append)
    assert any("broken cannot read images: the model's images cannot be processed" in line for line in said)
    said.clear()
    blind = open_conversation(str(write_model(tmp_path / "text")), said.append)
    said.clear()
    for paths in ("", "'", "x.png"):
        assert blind.open_images(paths) == []
    assert said == ["text cannot read images"] * 3
    assert conversation.open_images("") == []
    assert conversation.open_images("'") == []
