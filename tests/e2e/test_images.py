"""Runs on pairs with images: that of the page about them, and one on records in memory."""

import os
import re
import shlex
import sys
from pathlib import Path

from tests.support.image_model import image_pair, write_image_model
from tests.support.launch import history, run_verb, summary
from tests.support.pages import ROOT, blocks_of, in_process

PAGE = "docs/models.md"


def run_scripts(folder: Path) -> None:
    """Run the Python blocks of the page, in the folder where a reader would save them."""
    os.chdir(folder)
    for block in blocks_of(PAGE, "Try it"):
        if block.language == "python":
            exec(compile(block.text, PAGE, "exec"), {})


def ask(folder: Path) -> None:
    """Type what the page says after the run: a picture, then a question, to a model with a short context."""
    from dpo_dist.tools.chat import __main__ as chat

    page = (ROOT / PAGE).read_text()
    command = re.search(r"`dpo-dist chat (\S+)` answers", page)
    lines = re.search(r"type `(/image \S+)`, then `(.+?)`", page)
    assert command is not None
    assert lines is not None
    os.chdir(folder)
    Path("lines").write_text("\n".join(lines.groups()))
    with Path("lines").open() as sys.stdin:
        assert chat.main([*command.groups()]) == 0


def test_a_model_learns_what_only_the_picture_says_as_the_page_shows(tmp_path: Path) -> None:
    in_process(run_scripts, tmp_path)
    screens = "".join(block.text for block in blocks_of(PAGE, "Try it") if block.language == "console")
    command = next(line for line in screens.splitlines() if line.startswith("$ dpo-dist train "))
    overrides = [*shlex.split(command)[3:], "tracking=off"]
    ended = run_verb("train", overrides, cwd=tmp_path)
    assert ended.code == 0, ended.output
    run = tmp_path / "output/pictures"
    accuracies = [row["eval_rewards/accuracies"] for row in history(run) if "eval_loss" in row]
    assert (accuracies[0], accuracies[-1]) == (0.5, 1.0)
    assert "data:image/jpeg;base64," in (run / "report.html").read_text()
    in_process(ask, tmp_path)
    again = run_verb("train", [*overrides, "loss.beta=0.1", "trainer.max_steps=1", "run.dir=b"], cwd=tmp_path)
    assert again.code == 0, again.output
    assert summary(tmp_path / "b")["reference"]["computed"] == 0


def train_in_memory(folder: Path) -> None:
    """Train on pictures of Pillow, and on one that is named as the script would open it."""
    from PIL import Image

    from dpo_dist import api

    colours = ("red", "green", "blue")
    records = [image_pair(Image.new("RGB", (60, 50), name), f"It is {name}.", "No.") for name in colours]
    os.chdir(folder)
    records[0]["images"][0].save("red.png")
    records[0]["images"] = ["red.png"]
    words = [f"model.path={write_image_model(folder / 'model')}", "model.images.train=none", "data.eval=[]"]
    words += ["model.dtype=fp32", "parallelism=ddp", "trainer.global_batch_pairs=3", "trainer.max_steps=2"]
    words += ["tracking=off", f"run.root={folder}/output", f"run.dir={folder}/run"]
    api.train(words, train=records)


def test_records_in_memory_have_pictures_of_pillow_or_name_them(tmp_path: Path) -> None:
    in_process(train_in_memory, tmp_path)
    assert summary(tmp_path / "run")["data"]["train"]["kept"] == 3
