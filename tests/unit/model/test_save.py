"""Model folders on a file system without room."""

from pathlib import Path

import pytest

from dpo_dist.foundation.errors import CheckpointError
from dpo_dist.model.save import write_tokenizer, writing_errors
from tests.support import tiny


def test_a_tokenizer_that_finds_no_room_is_an_error_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="cannot be written") as raised, writing_errors(tmp_path):
        write_tokenizer(tmp_path, tiny.qwen(), None)
    assert "No space left on device" in raised.value.block()
    assert str(tmp_path) in raised.value.block()
