"""A chat template that takes too much time or memory ends with one block that names it."""

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_dist.data import template
from dpo_dist.data.template import argument_names, limited
from dpo_dist.data.tokenizer import tokenizer_facts
from dpo_dist.foundation.errors import ConfigError
from tests.support import tiny

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
NORMAL = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
DOUBLING = (
    "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ 'x' * 10**10 }}",
        "{{ ['x'] * 10**10 }}",
        DOUBLING,
        "{% set n = namespace(x='') %}{% set n.x = 'xx' %}" + "{% set n.x = n.x + n.x %}" * 40,
        "{{ 'x'.ljust(10**10) }}",
        "{{ 'x' | center(10**10) }}",
        "{{ '%09999999999d' | format(1) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{% set a = 'x' * 10**5 %}{{ a | replace('x', a) }}",
        "{{ {'a': 1} | tojson(indent=10**10) }}",
        LOOPS + "{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
        "{{ (9 ** (9 ** 9)) % 2 }}",
        "{{ 'x' * 10**7 }}",
    ],
)
def test_a_template_without_end_is_named(
    attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "SECONDS", 0.25)
    monkeypatch.setattr(template, "MEMORY", 1 << 27)
    monkeypatch.setattr(template, "CHARACTERS", 1 << 22)
    tokenizer = tiny.qwen()
    tokenizer.save_pretrained(tmp_path)
    tokenizer = type(tokenizer).from_pretrained(tmp_path)
    tokenizer.chat_template = NORMAL + attack
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ConfigError, match="takes too much time or memory") as raised:
        tokenizer_facts(tokenizer)
    assert str(tmp_path) in raised.value.where
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_a_process_that_has_grown_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "_known", (time.monotonic() + 60, 1 << 20))
    assert limited(lambda: "x" * 1000, "a.jinja") == "x" * 1000
    text = limited(lambda: "x" * (1 << 25), "a.jinja")
    assert len(text) == 1 << 25


def test_errors_of_a_template_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise ValueError("of the template")

    with pytest.raises(ValueError, match="of the template"):
        limited(fail, "a.jinja")


ONE_OPERATION = """
from dpo_dist.data.tokenization import template_limits
template_limits.SECONDS = 0.1
a, b = [0], [0]
for _ in range(60):
    a, b = [a, a], [b, b]
template_limits.limited(lambda: str(a == b), "a.jinja")
"""


def test_an_operation_without_end_ends_the_process_with_its_stack() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ONE_OPERATION], stderr=subprocess.PIPE, text=True, timeout=300, check=False
    )
    assert ended.returncode == -signal.SIGPROF
    assert "template_limits.py" in ended.stderr


@pytest.mark.parametrize(
    "fault",
    [
        "{{ cycler() }}",
        "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
        "{% if 1 %}" * 200 + "{% endif %}" * 200,
    ],
    ids=["RuntimeError", "SyntaxError", "IndentationError"],
)
def test_any_error_of_a_template_is_named(fault: str) -> None:
    facts = tokenizer_facts(tiny.with_template(tiny.qwen(), NORMAL + fault))
    assert facts.chat is not None
    with pytest.raises(ConfigError, match="cannot render a user turn"):
        _ = facts.chat.after_response


def test_a_template_nested_too_deeply_is_no_jinja() -> None:
    with pytest.raises(ConfigError, match="not valid Jinja"):
        argument_names("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}")
