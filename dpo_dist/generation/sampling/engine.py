"""The program that generates: transformers, or vLLM where it is installed."""

import importlib.util
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from dpo_dist.config.pairs_schema import Engine
from dpo_dist.config.schema import ModelConfig, RunConfig
from dpo_dist.errors import ConfigError
from dpo_dist.generation.sampling.generate import Request, Sample, Sampling, generate
from dpo_dist.generation.sampling.responder import Responder, load_responder
from dpo_dist.model.adapter_files import ADAPTER_CONFIG
from dpo_dist.model.folder import read_model_json

# Values that `max_lora_rank` of vLLM may have (`vllm.config.lora.MaxLoRARanks`, 0.14).
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class Generator(Protocol):
    """A loaded model that generates."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        """Return a sample for each request, in their order."""


def chosen_engine(engine: Engine, *, quantized: bool = False) -> Engine:
    """Return the engine of `pairs.engine`, with `auto` resolved: transformers for quantized weights.

    Raises:
        ConfigError: vLLM is wanted and not installed.
    """
    is_installed = importlib.util.find_spec("vllm") is not None
    if engine is Engine.vllm and not is_installed:
        raise ConfigError(
            "vLLM is not installed",
            where="pairs.engine",
            got="vllm",
            remedy="install it, or set pairs.engine=transformers",
        )
    if engine is not Engine.auto:
        return engine
    return (
        Engine.vllm if is_installed and not quantized and torch.cuda.is_available() else Engine.transformers
    )


def open_generator(
    responder: Responder, engine: Engine, config: RunConfig, device: torch.device
) -> Generator:
    """Load a responder's weights into an engine.

    Raises:
        ConfigError: they cannot be loaded.
    """
    if engine is Engine.vllm:
        from vllm import LLM  # noqa: PLC0415  (optional)

        return VllmGenerator(LLM, responder, config.model)
    causal_lm = load_responder(responder.source, config.model, device)
    return TransformersGenerator(causal_lm, responder.stop_ids, config.pairs.batch_tokens)


class TransformersGenerator:
    """Generates by transformers, batch after batch.

    Args:
        causal_lm: in evaluation mode.
        stop_ids: tokens that end a response.
        batch_tokens: most tokens of a batch.
    """

    def __init__(self, causal_lm: Any, stop_ids: Collection[int], batch_tokens: int):
        self._causal_lm, self._stop_ids, self._budget = causal_lm, stop_ids, batch_tokens

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        """Return a sample for each request, in their order."""
        return generate(self._causal_lm, requests, sampling, self._stop_ids, self._budget)


def lora_options(adapter: Path | None) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` about the folder of an adapter.

    Raises:
        ConfigError: vLLM does not load an adapter of this kind.
    """
    if adapter is None:
        return {"enable_lora": False}
    content: dict[str, Any] = read_model_json(adapter / ADAPTER_CONFIG)
    rank = max([content.get("r") or 0, *(content.get("rank_pattern") or {}).values()])
    kinds = {
        "use_dora": bool(content.get("use_dora")),
        "modules_to_save": bool(content.get("modules_to_save")),
        f"r={rank}": rank > _LORA_RANKS[-1],
    }
    if refused := [kind for kind, has in kinds.items() if has]:
        raise ConfigError(
            "vLLM does not load an adapter of this kind",
            where="pairs.models",
            got=f"{adapter}: {', '.join(refused)}",
            remedy="set pairs.engine=transformers, or merge it: python -m dpo_dist.export export.merge=true",
        )
    return {"enable_lora": True, "max_lora_rank": next(limit for limit in _LORA_RANKS if rank <= limit)}


class VllmGenerator:
    """Generates by vLLM, which batches by itself; each sample has its own seed.

    The arguments follow vLLM's documentation. This project's tests run it against a stub only.

    Args:
        llm: the class `vllm.LLM`.
        responder: model, tokenizer and stop tokens.
        config: precision and remote code.
    """

    def __init__(self, llm: Any, responder: Responder, config: ModelConfig):
        source = responder.source
        self._stop_ids, self._adapter = responder.stop_ids, source.adapter
        self._llm = llm(
            model=str(source.folder),
            tokenizer=str(source.tokenizer_folder),
            dtype={"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[config.dtype],
            trust_remote_code=config.trust_remote_code,
            **lora_options(source.adapter),
            generation_config="vllm",  # no defaults of the model's folder
        )

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        """Return a sample for each request, in their order."""
        from vllm import SamplingParams  # noqa: PLC0415  (optional)
        from vllm.lora.request import LoRARequest  # noqa: PLC0415

        parameters = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k or -1,
                max_tokens=sampling.max_new_tokens,
                seed=request.seed(sampling) % 2**31,
                stop_token_ids=sorted(self._stop_ids),
                detokenize=False,
            )
            for request in requests
        ]
        outputs = self._llm.generate(
            [{"prompt_token_ids": request.prompt_ids.tolist()} for request in requests],
            parameters,
            lora_request=LoRARequest("adapter", 1, str(self._adapter)) if self._adapter else None,
        )
        return [Sample.of(list(output.outputs[0].token_ids), self._stop_ids) for output in outputs]
