"""Options of a conversation."""

import pytest

from dpo_dist.foundation.errors import ConfigError
from dpo_dist.tools.chat import __main__ as chat


@pytest.mark.parametrize(
    "option", ["--temperature=-1", "--temperature=nan", "--max-new-tokens=0", "--max-new-tokens=-3"]
)
def test_a_number_out_of_bounds_is_refused_before_the_model_is_loaded(option: str) -> None:
    with pytest.raises(ConfigError, match="at least") as raised:
        chat.main(["nothing", option])
    assert raised.value.exit_code == 2


def test_a_key_of_a_configuration_is_refused_with_the_options_that_chat_has() -> None:
    with pytest.raises(ConfigError, match="no key but") as raised:
        chat.main(["nothing", "sampling.temperature=0.3"])
    assert "--temperature" in raised.value.remedy
