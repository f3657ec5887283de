"""Options of a conversation, and damaged runs."""

from pathlib import Path

import pytest

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.tools.chat import __main__ as chat
from dpo_dist.tools.chat.conversation import open_conversation
from dpo_dist.training.export import checkpoint_as_model


@pytest.mark.parametrize(
    "option", ["--temperature=-1", "--temperature=nan", "--max-new-tokens=0", "--max-new-tokens=-3"]
)
def test_a_number_out_of_bounds_is_refused_before_the_model_is_loaded(option: str) -> None:
    with pytest.raises(ConfigError, match="at least") as raised:
        chat.main(["nothing", option])
    assert raised.value.exit_code == 2


def test_a_key_of_a_configuration_is_refused_with_the_options_that_chat_has() -> None:
    with pytest.raises(ConfigError, match="invalid choice: 'sampling") as raised:
        chat.main(["nothing", "sampling.temperature=0.3"])
    assert "--temperature" in str(raised.value.expected)
    assert "trust_remote_code" in str(raised.value.expected)


@pytest.mark.parametrize("content", [b"model: \xff", b"a: &a [x]\nb: [*a]", b"[1]", None])
def test_a_damaged_or_missing_configuration_is_a_plain_error(tmp_path: Path, content: bytes | None) -> None:
    """Read for a conversation, and for a checkpoint as a model; `None`: missing."""
    checkpoint, model = tmp_path / "checkpoints" / "step-000001", tmp_path / "model"
    for folder in (checkpoint, model):
        folder.mkdir(parents=True)
    for file in ("manifest.json", "state.json"):
        (checkpoint / file).write_text("{}")
    (tmp_path / "run_state.json").write_text("{}")
    (tmp_path / "dpo_metrics").mkdir()
    (tmp_path / "dpo_metrics" / "log_history.json").touch()
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content)
    for folder in (checkpoint, model):
        with pytest.raises(ConfigError):
            open_conversation(str(folder), print)
    with pytest.raises(ConfigError):
        checkpoint_as_model(checkpoint, tmp_path / "written", print)
