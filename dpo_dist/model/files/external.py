"""The commands by which lm-eval and vLLM read a model folder."""

import json
from pathlib import Path
from typing import Any

from dpo_dist.config.schema import Dtype, ExportTool, ModelConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.files.folder import ADAPTER_CONFIG, CONFIG_FILE, is_adapter, read_model_json

_DTYPES = {Dtype.bf16: "bfloat16", Dtype.fp16: "float16", Dtype.fp32: "float32"}
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def model_command(tool: ExportTool, folder: Path, model: ModelConfig) -> list[str]:
    """Return the words of the command by which lm-eval or vLLM reads an exported folder.

    `model` names an adapter's base. Paths are in JSON, in which they may contain commas and equals signs.
    """
    folder = folder.resolve()
    adapter = is_adapter(folder)
    facts: dict[str, Any] = {}
    if adapter:
        local = Path(model.path).expanduser().resolve()
        base = str(local) if local.is_dir() else model.path
        facts["dtype"] = _DTYPES[model.dtype]
        if model.revision is not None:
            facts["revision"] = model.revision
    else:
        base = str(folder)
        facts["dtype"] = read_model_json(folder / CONFIG_FILE).get("dtype") or "auto"
    if tool is ExportTool.vllm:
        words = ["vllm", "serve", base]
        for name, value in facts.items():
            words += [f"--{name}", value]
        if model.trust_remote_code:
            words.append("--trust-remote-code")
        return words + _vllm_adapter(folder) if adapter else words
    words = ["lm-eval", "run", "--model", "hf"]
    facts = {"pretrained": base, **facts}
    if model.trust_remote_code:
        facts["trust_remote_code"] = True
    if adapter:
        facts |= {"peft": str(folder), "tokenizer": str(folder)}
        # lm-eval reads the base's generation_config.json, which may lack the end of a turn.
        stops = read_model_json(folder / "generation_config.json")["eos_token_id"]
        words += ["--gen_kwargs", json.dumps({"eos_token_id": stops})]
    return [*words, "--model_args", json.dumps(facts), "--apply_chat_template", "--tasks", "ifeval"]


def _vllm_adapter(folder: Path) -> list[str]:
    facts: dict[str, Any] = {**read_model_json(folder / ADAPTER_CONFIG)}
    rank = max(facts["r"], 1, *(facts.get("rank_pattern") or {}).values())
    saved = facts.get("modules_to_save")
    # Of an adapter on stacked experts, releases of vLLM before 0.32 serve the base without a word.
    experts = bool(facts.get("target_parameters"))
    if facts.get("use_dora") or saved or experts or rank > _VLLM_RANKS[-1]:
        raise ConfigError(
            f"vLLM does not serve DoRA, modules_to_save, stacked experts or a rank above {_VLLM_RANKS[-1]}",
            where="export.tool",
            got=f"{folder} with use_dora={facts.get('use_dora')}, modules_to_save={saved}, rank {rank}"
            + ", target_parameters" * experts,
            remedy="set export.merge=true",
        )
    words = ["--tokenizer", str(folder), "--generation-config", str(folder), "--enable-lora"]
    words += ["--max-lora-rank", str(next(size for size in _VLLM_RANKS if size >= rank))]
    return [*words, "--lora-modules", json.dumps({"name": folder.name, "path": str(folder)})]
