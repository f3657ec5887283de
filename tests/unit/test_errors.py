"""An error is one block that says what, where, got, expected and what to do, on whichever rank it is read."""

import pickle

import pytest

from dpo_dist import errors
from dpo_dist.errors import ConfigError, DataError, DivergedError, DpoDistError, PeerLostError


def test_block_has_a_line_for_each_part() -> None:
    error = ConfigError("it is wrong", where="loss.beta", got="-1", expected="above 0", remedy="raise it")
    assert error.block().splitlines() == [
        "configuration error: it is wrong",
        "  where:    loss.beta",
        "  got:      -1",
        "  expected: above 0",
        "  to do:    raise it",
    ]
    assert str(error) == error.block()


def test_parts_without_text_are_left_out() -> None:
    assert DataError("no pair", where="a.jsonl:3").block() == "data error: no pair\n  where:    a.jsonl:3"


def kinds() -> list[type[DpoDistError]]:
    return [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DpoDistError)
    ]


@pytest.mark.parametrize("kind", kinds())
def test_an_error_comes_whole_to_another_process(kind: type[DpoDistError]) -> None:
    error = kind("what", where="where", got="got", expected="expected", remedy="remedy")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert copy.block() == error.block()
    assert copy.exit_code == error.exit_code


def test_exit_codes_are_the_documented_ones() -> None:
    assert {kind: kind.exit_code for kind in kinds()} == {
        kind: {DivergedError: 3, PeerLostError: 1}.get(kind, 2) for kind in kinds()
    }
