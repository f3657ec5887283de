"""A conversation: the answers of transformers and peft, turn after turn."""

import os
import pty
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.streams import printable_lines
from dpo_dist.tools.chat import __main__ as chat
from tests.e2e.conftest import Overrides
from tests.support.launch import command, environment, train
from tests.support.warm import ENVIRONMENT, run_warm_apart

QUESTIONS = ("Which is larger, 3 or 5?", "And 7?")


def read_from(file: Path) -> None:
    """Make a file the standard input of this process."""
    os.dup2(os.open(file, os.O_RDWR), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115


def says(folder: Path, *arguments: str, lines: list[str]) -> str:
    """What `chat` prints for these lines, greedy."""
    options = ["--temperature", "0", "--max-new-tokens", "6"]
    (folder / "lines").write_text("".join(f"{line}\n" for line in lines))
    code, output, errors = run_warm_apart(
        "dpo_dist.tools.chat",
        [*arguments, *options],
        environment() | ENVIRONMENT,
        folder,
        300,
        partial(read_from, folder / "lines"),
    )
    assert code == 0, errors
    return output


@pytest.mark.parametrize(
    "option", ["--temperature=-1", "--temperature=nan", "--max-new-tokens=0", "--max-new-tokens=-3"]
)
def test_a_number_out_of_bounds_is_refused_before_the_model_is_loaded(option: str) -> None:
    with pytest.raises(ConfigError, match="at least") as raised:
        chat.main(["nothing", option])
    assert raised.value.exit_code == 2


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


def test_an_adapter_answers_beside_its_base_with_the_turns_before(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    ended = train(overrides("trainer.max_steps=2", "optim.lr=5e-2", "model.adapter={r: 4}"))
    assert f"dpo-dist chat {tmp_path}/run" in ended.output
    run, tokenizer = tmp_path / "run", AutoTokenizer.from_pretrained(assets / "model")
    base = answers(plain(assets / "model"), tokenizer)
    trained = answers(PeftModel.from_pretrained(plain(assets / "model"), run / "model"), tokenizer)
    assert trained != base
    lines = [f"run: {own}\nbase: {other}\n" for own, other in zip(trained, base, strict=True)]
    asked = [*QUESTIONS, "/help", "/new", QUESTIONS[0], "", "not asked"]
    printed = says(tmp_path, str(run), "--beside", "base", lines=asked)
    assert printed == "".join([*lines, lines[0]])


def test_a_checkpoint_answers_beside_the_model_that_its_run_started_from(
    overrides: Overrides, assets: Path, tmp_path: Path
) -> None:
    train(overrides("trainer.max_steps=2", "optim.lr=1e-2"))
    run, tokenizer = tmp_path / "run", AutoTokenizer.from_pretrained(assets / "model")
    trained, base = (answers(plain(folder), tokenizer)[0] for folder in (run / "model", assets / "model"))
    assert trained != base
    checkpoint = run / "checkpoints/step-000002"
    printed = says(tmp_path, str(checkpoint), "--beside", "base", lines=[QUESTIONS[0]])
    assert printed == f"run/step-000002: {trained}\nbase: {base}\n"
    assert says(tmp_path, str(run / "model"), lines=[QUESTIONS[0]]) == f"{trained}\n"
