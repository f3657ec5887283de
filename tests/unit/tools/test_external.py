"""What `export.tool` gives to lm-eval and vLLM, read by their own parsers, if installed."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from peft import LoraConfig

from dpo_dist.config.schema import Dtype, ExportTool, ModelConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.files.external import model_command
from tests.support.tiny_model import write_model

VLLM = Path(os.environ.get("DPO_DIST_VLLM", "/none"), "bin", "python")
_PARSE = """
import json, sys
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.lora.peft_helper import PEFTHelper
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
ServeSubcommand().subparser_init(parser.add_subparsers())
words = parser.parse_args(sys.argv[2:])
names = ["model_tag", "tokenizer", "generation_config", "dtype", "revision", "trust_remote_code"]
print(json.dumps({name: getattr(words, name) for name in names} | {
    "rank": words.max_lora_rank, "adapters": [[each.name, each.path] for each in words.lora_modules or ()]}))
"""


def adapter(folder: Path, **facts: Any) -> Path:
    LoraConfig(**{"r": 8, "target_modules": ["q_proj"], **facts}).save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    return folder


def on(base: str | Path, **facts: Any) -> ModelConfig:
    return ModelConfig(path=str(base), **facts)


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def lm_eval_arguments(words: list[str]) -> dict[str, Any]:
    """What lm-eval reads, by its own parser where it is installed."""
    arguments: dict[str, Any] = json.loads(option(words, "--model_args"))
    try:
        from lm_eval._cli.harness import HarnessCLI
    except ImportError:
        return arguments
    with mock.patch("sys.argv", words):
        parsed = HarnessCLI().parse_args()
    assert (parsed.model, parsed.tasks, parsed.apply_chat_template) == ("hf", ["ifeval"], True)
    assert parsed.model_args == arguments
    if "peft" in arguments:
        assert parsed.gen_kwargs == json.loads(option(words, "--gen_kwargs"))
    return arguments


def test_lm_eval_reads_a_whole_model_and_an_adapter_on_its_base(tmp_path: Path) -> None:
    base = write_model(tmp_path / "a, base=1")
    whole = model_command(ExportTool.lm_eval, base, on("org/other", trust_remote_code=True))
    # The folder's own precision, which is not the run's.
    wanted = {"pretrained": str(base), "dtype": "float32", "trust_remote_code": True}
    assert lm_eval_arguments(whole) == wanted
    trained = adapter(tmp_path / "step-000010")
    words = model_command(ExportTool.lm_eval, trained, on(base, dtype=Dtype.fp16))
    both = {"peft": str(trained), "tokenizer": str(trained)}
    assert lm_eval_arguments(words) == {"pretrained": str(base), "dtype": "float16", **both}
    assert json.loads(option(words, "--gen_kwargs")) == {"eos_token_id": [2, 7]}
    words = model_command(ExportTool.lm_eval, trained, on("org/base", revision="abc"))
    wanted = {"pretrained": "org/base", "dtype": "bfloat16", "revision": "abc", **both}
    assert lm_eval_arguments(words) == wanted


def test_paths_of_a_command_hold_in_every_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(Path("base"))
    words = model_command(ExportTool.vllm, adapter(Path("out")), on("./base"))
    assert words[:3] == ["vllm", "serve", str(tmp_path / "base")]
    for name in ("--tokenizer", "--generation-config"):  # the adapter's own template and stop tokens
        assert option(words, name) == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("facts", "size"),
    [({"r": 1}, "1"), ({"r": 16}, "16"), ({"r": 17}, "32"), ({"rank_pattern": {"k_proj": 300}}, "320")],
)
def test_vllm_has_room_for_the_largest_matrix(facts: dict[str, Any], size: str, tmp_path: Path) -> None:
    words = model_command(ExportTool.vllm, adapter(tmp_path / "out", **facts), on("org/base"))
    assert option(words, "--max-lora-rank") == size


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["norm"]}, "modules_to_save=['norm']"),
        ({"r": 513}, "rank 513"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
    ],
)
def test_an_adapter_that_vllm_refuses_is_refused_with_what_to_set(
    facts: dict[str, Any], named: str, tmp_path: Path
) -> None:
    folder = adapter(tmp_path / "out", **facts)
    with pytest.raises(ConfigError, match="vLLM does not serve DoRA") as refused:
        model_command(ExportTool.vllm, folder, on("org/base"))
    assert str(folder) in refused.value.got
    assert named in refused.value.got
    assert refused.value.remedy == "set export.merge=true"
    model_command(ExportTool.lm_eval, folder, on("org/base"))


@pytest.mark.skipif(not VLLM.exists(), reason="DPO_DIST_VLLM names no environment with vLLM")
def test_vllm_parses_the_commands(tmp_path: Path) -> None:
    base, trained = write_model(tmp_path / "base, 1"), adapter(tmp_path / "step, 10", r=12)

    def parsed(folder: Path, model: ModelConfig) -> dict[str, Any]:
        words = model_command(ExportTool.vllm, folder, model)
        ended = subprocess.run([VLLM, "-c", _PARSE, *words], capture_output=True, check=True, text=True)
        found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
        return found

    found = parsed(base, on(base, trust_remote_code=True))
    assert (found["model_tag"], found["dtype"], found["adapters"]) == (str(base), "float32", [])
    assert found["trust_remote_code"]
    found = parsed(trained, on("org/base", revision="abc"))
    assert (found["model_tag"], found["revision"], found["rank"]) == ("org/base", "abc", 16)
    assert found["tokenizer"] == found["generation_config"] == str(trained)
    assert found["adapters"] == [["step, 10", str(trained)]]
