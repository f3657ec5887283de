"""What a test leaves behind does not reach the next one."""

import io
from threading import Thread
from unittest import mock

import pytest
from tqdm.std import tqdm


@pytest.mark.parametrize("test", ["first", "next"])
def test_a_bar_that_cannot_be_written_blocks_no_thread_of_the_next_test(test: str) -> None:
    thread = Thread(target=lambda: tqdm(disable=True), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    bar = tqdm(file=io.StringIO())
    with mock.patch.object(bar, "display", side_effect=InterruptedError), pytest.raises(InterruptedError):
        bar.refresh()  # tqdm does not release its lock here
    bar.disable = True
