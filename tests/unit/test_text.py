"""Numbers are written the same everywhere; secrets leave no text that is printed, logged or written."""

import contextlib
import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_dist.config.command_line import write_command
from dpo_dist.config.load import changed_keys, load_run_config, saved_config, to_yaml
from dpo_dist.config.metrics import METRICS
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.foundation.console import open_console
from dpo_dist.foundation.streams import print_line, print_result
from dpo_dist.foundation.text import (
    duration,
    first_few,
    number,
    percent,
    percent_of,
    pluralize,
    size,
    with_interval,
    without_secrets,
)
from dpo_dist.tools.pairs.folder import PairsFolder
from dpo_dist.tools.pairs.rounds import check_settings


@pytest.mark.parametrize(
    ("written", "texts"),
    [
        (number, {0: "0", 12_345_678: "12,345,678", 0.25: "0.25", -0.123456: "-0.1235", 999.96: "1000"}),
        (number, {1234.6: "1,235", 22_345_678.0: "2.23e7", 1e-3: "0.001", 5e-7: "5e-7"}),
        (number, {math.nan: "not finite", -math.inf: "not finite"}),
        (percent, {0.0: "0 %", 1e-6: "under 0.01 %", 0.00341: "0.34 %", 0.052: "5.2 %", 0.4149: "41 %"}),
        (percent, {0.9967: "99.6 %", 0.99999: "99.9 %", 1.0: "100 %", 1.22: "122 %"}),
        (duration, {0: "0 s", 0.41: "0.41 s", 9.97: "10 s", 59.6: "1 min 00 s", 303: "5 min 03 s"}),
        (duration, {11_100: "3 h 05 min", 187_200: "2 d 04 h"}),
        (
            size,
            {
                0: "0 B",
                64: "64 B",
                512: "0.5 KiB",
                12.34 * 2**30: "12.3 GiB",
                9999 * 2**30: "9,999.0 GiB",
                3000 * 2**40: "3,000.0 TiB",
            },
        ),
    ],
)
def test_values_are_written(written: Callable[[float], str], texts: dict[float, str]) -> None:
    assert {value: written(value) for value in texts} == texts


def test_what_rounds_to_0_has_no_sign() -> None:
    assert with_interval(-1e-5, (-2e-4, 1e-3), ".3f") == "0.000 [0.000, 0.001]"
    assert METRICS["rewards/margins"].form(-1e-5) == "0.000"


def test_lists_and_counts() -> None:
    assert [first_few(list("abcd")[:count]) for count in (0, 3, 4)] == ["", "a, b, c", "a, b, c and 1 more"]
    assert first_few(["a"] * 5, "other") == "a, a, a and 2 others"
    assert [pluralize(count, "pair") for count in (0, 1, 2000)] == ["0 pairs", "1 pair", "2,000 pairs"]
    assert [pluralize(count, "entry", "entries") for count in (1, 2)] == ["1 entry", "2 entries"]
    assert [number(value, 3) for value in (0.98765, 999.6)] == ["0.988", "1000"], "never an exponent"


ENVIRONMENT = {"OPENAI_API_KEY": "of-my-endpoint", "HF_TOKEN": "short", "HOME": "/home/somebody"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass@host:8000/v1", "https://***@host:8000/v1"),
        ("https://me:p@ss@host/a@b", "https://***@host/a@b"),
        ("s3://bucket/data?X-Amz-Signature=abc#part", "s3://bucket/data?X-Amz-Signature=***#part"),
        ("hf_" + "a1" * 17, "***"),
        ("Bearer of-my-endpoint", "Bearer ***"),
        ("curl -H 'Authorization: Bearer abc' x", "curl -H 'Authorization: Bearer ***' x"),
        ("['-H', 'x-api-key: abc', 'x']", "['-H', 'x-api-key: ***', 'x']"),
        ("['--api-key', 'abc', 'x']", "['--api-key', '***', 'x']"),
        ('{"authorization": "abc", "x": 1}', '{"authorization": "***", "x": 1}'),
        ("X: Bearer abc", "X: Bearer ***"),
        ("a bearer of news has authorization to go", "a bearer of news has authorization to go"),
        ("the key in OPENAI_API_KEY, the api_key", "the key in OPENAI_API_KEY, the api_key"),
        ("/home/somebody/data?monkey=3", "/home/somebody/data?monkey=3"),
        ("org/sk-model a short text", "org/sk-model a short text"),
        ("data/hf_ultrafeedback_binarized_cleaned.jsonl", "data/hf_ultrafeedback_binarized_cleaned.jsonl"),
        ("sk-" + "proj-" + "Ab1_" * 3 + "a1B2" * 8, "***"),
        ("sk-" + "0f" * 16, "***"),
        ("./reload --token abc {model}", "./reload --token *** {model}"),
        (
            "['reload', '--hf-token=abc', '--password', 'abc']",
            "['reload', '--hf-token=***', '--password', '***']",
        ),
        ("sh -c 'HF_TOKEN=abc ./x'", "sh -c 'HF_TOKEN=*** ./x'"),
        ("curl -u me:abc -H 'X-Auth-Token: abc' host", "curl -u me:*** -H 'X-Auth-Token: ***' host"),
        ("curl -H 'Cookie: session=abc' -d token=abc", "curl -H 'Cookie: session=***' -d token=***"),
        ('{"access_token": "abc", "token": "the"}', '{"access_token": "***", "token": "the"}'),
        ("--eos_token '<|im_end|>' --tokenizer a", "--eos_token '<|im_end|>' --tokenizer a"),
        ("HF_TOKEN=$HF_TOKEN SSH_KEY=/data/key ./x", "HF_TOKEN=$HF_TOKEN SSH_KEY=/data/key ./x"),
        (
            "MAX_TOKENS=4096 --max-tokens 5; the cookie: sweet",
            "MAX_TOKENS=4096 --max-tokens 5; the cookie: sweet",
        ),
    ],
)
def test_a_secret_in_a_text_is_hidden(text: str, shown: str) -> None:
    found = without_secrets({"values": [text, 1, None, True]}, ENVIRONMENT)
    assert found == {"values": [shown, 1, None, True]}


def test_the_words_of_an_error_about_a_key_are_no_secret() -> None:
    for words in ("the command has words that are not KEY=VALUE", "write data.template_arguments.KEY=VALUE;"):
        assert without_secrets(words) == words


def test_json_without_its_secrets_is_json() -> None:
    value = {"text": 'x="https://host/a?token=abc"', "next": ["s3://data?key=abc", "b"]}
    for given in (value, without_secrets(value)):  # hidden twice, as in an error
        found = json.loads(without_secrets(json.dumps(given)))
        assert found == {"text": 'x="https://host/a?token=***"', "next": ["s3://data?key=***", "b"]}


@pytest.mark.parametrize(
    "name",
    ["MY_SECRET", "api_tokens", "KEY_2", "DB_PASS", "SSH_PASSPHRASE", "GITHUB_PAT", "A_CREDENTIAL"],
)
def test_variables_named_like_secrets_are_hidden(name: str) -> None:
    secret = 'a/"long"\nvalue'
    for written in (secret, "a%2F%22long%22%0Avalue", r"a/\"long\"\nvalue"):
        assert without_secrets(f"<{written}>", {name: secret}) == "<***>"
    assert without_secrets(secret, {"KEYBOARD": secret, "TOKENIZERS_PARALLELISM": secret}) == secret


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MY_SECRET", "canary-of-a-secret")
    return "canary-of-a-secret"


def test_nothing_is_printed_or_logged_with_a_secret(
    secret: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(RuntimeError), open_console(RunFolder(tmp_path).rank_log) as console:
        console.say(f"say {secret}")
        console.alarm(f"alarm {secret}")
        console.result("kind", {"text": secret}, [f"result {secret}"])
        logging.getLogger("a.library").warning("of a library: %s", secret)
        raise RuntimeError(f"a bug about {secret}")
    print_line(f"line {secret}")
    print_line(f"line {secret}", sys.stderr)
    print_result(f"result {secret}\n")
    shown = "".join(capfd.readouterr()) + (tmp_path / "logs/rank-0.log").read_text()
    assert secret not in shown
    assert shown.count("***") >= 10


def test_rounds_write_no_secret(secret: str, tmp_path: Path) -> None:
    given = ["model.path=m", "data.train=[t]", "pairs.method=samples", "pairs.function=m:f", "pairs.rounds=1"]
    config = load_run_config([*given, f"run.dir={tmp_path}/run", f"tracking.project={secret}"])
    folder = PairsFolder(config.run.path)
    check_settings(config, folder)
    write_command("pairs", config, folder.path / "stage", "python")
    folder.round(1).round_result.parent.mkdir(parents=True)
    folder.round(1).round_result.write_text("{}")
    check_settings(config, folder)  # the same settings, compared without their secrets
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 3
    assert not [file for file in files if secret in file.read_text()]


def test_a_secret_of_a_file_is_hidden_without_its_line_end() -> None:
    assert without_secrets("<canary-of-a-file>", {"HF_TOKEN": "canary-of-a-file\n"}) == "<***>"
    assert without_secrets("a         b", {"MY_KEY": " " * 9}) == "a         b"
    limits = {"MAX_TOTAL_TOKENS": "16777216", "PASS": "1"}
    assert without_secrets("16777216 tokens, 5 of 1", limits) == "16777216 tokens, 5 of 1"


def test_a_configuration_with_a_hidden_text_is_the_same_run_and_paths_are_read_back(
    secret: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = tmp_path / "models" / "qwen", tmp_path / "config.yaml"
    model.mkdir(parents=True)
    monkeypatch.setenv("SSH_KEY", str(model))  # a path that a variable names, too
    given = [f"model.path={model}", f"data.train=[{model}/{secret}.jsonl]", f"tracking.project={secret}"]
    config = load_run_config(given)
    file.write_text(to_yaml(config))
    read = saved_config(file)
    assert (read.model.path, read.tracking.project) == (str(model), "***")
    assert changed_keys(file, config.identity) == {}
    changed = changed_keys(file, load_run_config([*given, "loss.beta=0.3"]).identity)
    assert changed == {"loss.beta": (0.1, 0.3)}


def test_a_share_of_few_things_is_their_number() -> None:
    assert [percent_of(1.0, 1), percent_of(0.75, 4), percent_of(0.0, 9)] == ["1 of 1", "3 of 4", "0 of 9"]
    assert [percent_of(1.0, 10), percent_of(0.996, 1000)] == ["100 %", "99.6 %"]
