"""A conversation: the answers of transformers and peft, turn after turn."""

import os
import pty
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.streams import printable_lines
from dpo_dist.tools.chat import __main__ as chat
from tests.e2e.conftest import Overrides
from tests.support.image_model import write_image_model, write_pictures
from tests.support.launch import command, environment, train
from tests.support.tiny_model import write_model

QUESTIONS = ("Which is larger, 3 or 5?", "And 7?")


Says = Callable[..., str]


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Says:
    """What `chat` prints for lines of its standard input, greedy, in this process."""

    def said(*arguments: str, lines: Sequence[str], tokens: Sequence[str] = ("--max-new-tokens", "6")) -> str:
        (file := tmp_path / "lines").write_text("".join(f"{line}\n" for line in lines))
        capsys.readouterr()
        with file.open(encoding="utf-8") as asked:
            monkeypatch.setattr(sys, "stdin", asked)
            assert chat.main([*arguments, "--temperature", "0", *tokens]) == 0
        return capsys.readouterr().out

    return said


def test_ctrl_c_ends_an_answer_and_the_next_question_is_asked(assets: Path) -> None:
    """By a cold start, which has the terminal for itself."""
    arguments = [str(assets / "model"), "--temperature", "0", "--max-new-tokens", "1500"]
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # also where the tests run in the background of a shell
        os.execve(sys.executable, command("chat", arguments, 1), environment())
    read = partial(read_until, terminal)
    read(b"> ")
    for _ in range(2):
        os.write(terminal, b"Which is larger?\n")
        read(b"?\r\n")
        read(b" ")
        os.write(terminal, b"\x03")
        assert len(read(b"\n> ")) < 1500, "the answer goes on"
    os.write(terminal, b"\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)


def read_until(terminal: int, text: bytes) -> bytes:
    shown = b""
    while text not in shown:
        shown += os.read(terminal, 1)
    return shown


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def answers(causal_lm: Any, tokenizer: Any) -> list[str]:
    """The greedy answers of transformers to QUESTIONS, as two turns of a conversation."""
    messages, texts = [], []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = causal_lm.generate(
            **prompt, max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.eos_token_id
        )
        text = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": text})
        texts.append(printable_lines(text))
    return texts


def test_an_adapter_answers_with_the_turns_before(
    overrides: Overrides, assets: Path, tmp_path: Path, says: Says
) -> None:
    ended = train(overrides("trainer.max_steps=2", "optim.lr=5e-2", "model.adapter={r: 4}"))
    assert f" chat {tmp_path}/run" in ended.output
    run, tokenizer = tmp_path / "run", AutoTokenizer.from_pretrained(assets / "model")
    base = answers(plain(assets / "model"), tokenizer)
    trained = answers(PeftModel.from_pretrained(plain(assets / "model"), run / "model"), tokenizer)
    assert trained != base
    lines = [f"{text}\n" for text in trained]
    asked = [*QUESTIONS, "/help", "/new", QUESTIONS[0], "", "not asked"]
    assert says(str(run), lines=asked) == "".join([*lines, lines[0]])


def test_a_checkpoint_answers_as_the_model_of_its_run(
    overrides: Overrides, tmp_path: Path, says: Says, assets: Path
) -> None:
    train(overrides("trainer.max_steps=2", "optim.lr=1e-2"))
    run, tokenizer = tmp_path / "run", AutoTokenizer.from_pretrained(assets / "model")
    trained = answers(plain(run / "model"), tokenizer)[0]
    for location in (run / "model", run / "checkpoints/step-000002"):
        assert says(str(location), lines=[QUESTIONS[0]]) == f"{trained}\n"


@torch.no_grad()
def answer_to_pictures(folder: Path, messages: Sequence[Any], pictures: Sequence[Path]) -> str:
    """The greedy answer of transformers, by its image processor, to turns with `#` for each picture."""
    tokenizer, processor = (
        AutoTokenizer.from_pretrained(folder),
        Qwen2VLImageProcessorPil.from_pretrained(folder),
    )
    text = tokenizer.apply_chat_template([*messages], tokenize=False, add_generation_prompt=True)
    images = [processor([Image.open(picture)], return_tensors="pt") for picture in pictures]
    first, *others = text.split("#")
    for image, after in zip(images, others, strict=True):
        placeholders = "<|image_pad|>" * (int(image["image_grid_thw"].prod()) // 4)
        first += f"<|vision_start|>{placeholders}<|vision_end|>{after}"
    model, ids = AutoModelForMultimodalLM.from_pretrained(folder), tokenizer(first, return_tensors="pt")
    kinds = (ids["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    seen = {name: torch.cat([image[name] for image in images]) for name in images[0]} if images else {}
    found = model.generate(**ids, **seen, mm_token_type_ids=kinds, max_new_tokens=6, do_sample=False)
    return str(tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def test_images_come_before_the_next_question_and_stay_in_the_conversation(
    tmp_path: Path, says: Says
) -> None:
    folder, pictures = write_image_model(tmp_path / "model"), write_pictures(tmp_path).parent
    red, blue = pictures / "red one.png", pictures / "blue one.png"
    first = [{"role": "user", "content": "#Is it red?"}]
    second = [*first, {"role": "assistant", "content": answer_to_pictures(folder, first, [red])}]
    second.append({"role": "user", "content": "##And these?"})
    wanted = [second[1]["content"], answer_to_pictures(folder, second, [red, blue, red])]
    wanted.append(answer_to_pictures(folder, [{"role": "user", "content": "Is it red?"}], []))
    asked = [f"/image '{red}' no.png", "Is it red?", f"/image '{blue}'", f"/image '{red}'", "And these?"]
    printed = says(str(folder), lines=[*asked, f"/image '{red}'", "/new", "Is it red?"])
    assert printed == "".join(f"{printable_lines(text)}\n" for text in wanted)


def test_an_answer_takes_what_is_left_of_a_short_context_if_no_length_is_asked(
    tmp_path: Path, says: Says
) -> None:
    """As after the quickstart, whose model has 512 tokens, the usual length of an answer."""
    folder = write_model(tmp_path / "model", longest=64)
    with torch.no_grad():
        ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(
            [{"role": "user", "content": QUESTIONS[0]}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        config = {"do_sample": False, "max_length": 64, "max_new_tokens": None}
        found = plain(folder).generate(ids, **config)[0, ids.shape[1] :]
    wanted = AutoTokenizer.from_pretrained(folder).decode(found, skip_special_tokens=True)
    assert says(str(folder), lines=QUESTIONS[:1], tokens=()) == f"{printable_lines(wanted)}\n"
    with pytest.raises(ConfigError, match="cannot be asked") as raised:
        says(str(folder), lines=QUESTIONS[:1], tokens=("--max-new-tokens", "60"))
    assert "60 more tokens" in raised.value.expected
