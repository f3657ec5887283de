"""The files of the newest evaluation are those of one evaluation."""

import os
import threading
from pathlib import Path

import pytest

from dpo_dist.config.run_folder import RunFolder
from dpo_dist.training.evaluate import make_newest


def test_two_evaluations_at_once_do_not_mix_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    first, second = run.evaluation_of("first"), run.evaluation_of("second")
    for own in (first, second):
        own.path.mkdir(parents=True)
        for file in own.files:
            file.write_text(own.path.name)
    other = threading.Thread(target=make_newest, args=(second, run.evaluation))
    link = os.link

    def link_beside_another(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        link(source, target)
        other.start()
        other.join(0.5)

    monkeypatch.setattr(os, "link", link_beside_another)
    make_newest(first, run.evaluation)
    other.join()
    assert {file.read_text() for file in run.evaluation.files} == {"second"}
