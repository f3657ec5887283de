"""A real vLLM serves a real model: the check tells its rounding from other weights, copies and prompts."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_dist.config.schema import Dtype, ModelConfig
from dpo_dist.data.config import DataConfig
from dpo_dist.data.records import Message, Origin, PreferenceRecord
from dpo_dist.foundation.console import Console, LineScreen
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.files.save import write_merged
from dpo_dist.reference.model_source import find_files
from dpo_dist.tools.sampling.generate import Request
from dpo_dist.tools.sampling.keys import ServerConfig
from dpo_dist.tools.sampling.respond import Responder, open_responder, usable_prompt
from dpo_dist.tools.sampling.served import Server, check_served, open_server, reload_server
from dpo_dist.tools.sampling.settings import Sampling
from tests.support import tiny
from tests.support.completions_server import to_int8
from tests.support.families import tiny_causal_lm, tiny_config

VLLM, MODEL = (os.environ.get(name, "") for name in ("DPO_DIST_VLLM", "DPO_DIST_MODEL"))
pytestmark = [
    pytest.mark.skipif(not Path(VLLM).is_file(), reason="DPO_DIST_VLLM names no vllm"),
    pytest.mark.skipif(
        not Path(MODEL, "config.json").is_file(), reason="DPO_DIST_MODEL names no model folder"
    ),
    pytest.mark.timeout(3600),
]
CPU, SYSTEM = torch.device("cpu"), Message("system", "You are a gardener who answers in one short sentence.")
TOPICS = ["rain", "bread", "cats", "clocks", "paper", "salt", "trees", "music", "glass", "iron", "snow"]
RECORDS = [
    PreferenceRecord((SYSTEM, Message("user", f"Tell me something about {topic}.")), (), Origin("a", at))
    for at, topic in enumerate(TOPICS)
]
RELOAD = (
    "import json, sys, urllib.request as web; "
    "body = {'method': 'reload_weights', 'kwargs': {'weights_path': sys.argv[2]}}; "
    "headers = {'Content-Type': 'application/json'}; "
    "place = sys.argv[1].replace('/v1', '/collective_rpc'); "
    "web.urlopen(web.Request(place, json.dumps(body).encode(), headers))"
)


@contextlib.contextmanager
def serving(model: str | Path, file: Path, *options: str) -> Iterator[str]:
    """The address of a vLLM, whose log is `file`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = f"--served-model-name policy --host 127.0.0.1 --port {port} --max-model-len 2048"
    words += " --max-num-seqs 32 --enforce-eager --no-enable-prefix-caching"
    command = [VLLM, "serve", str(model), *words.split(), *options]
    variables = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1"}
    with file.open("w") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
        address = f"http://127.0.0.1:{port}/v1"
        try:
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{address}/models")
                    break
                assert process.poll() is None, file.read_text()
                time.sleep(1)
            yield address
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a vLLM in bf16."""
    with serving(MODEL, tmp_path_factory.mktemp("vllm") / "log.txt") as address:
        yield address


def config(folder: str) -> ModelConfig:
    return ModelConfig(path=folder, dtype=Dtype.fp32)


def opened(url: str, folder: str, **data: Any) -> Server:
    source = find_files(folder, config(folder), "model.path")
    return open_server(
        ServerConfig(url=url, model="policy"), open_responder(source, config(folder), DataConfig())
    )


def check(url: str, folder: str) -> str:
    said: list[str] = []
    check_served(opened(url, folder), RECORDS, config(folder), CPU, Console(LineScreen(said.append)))
    return "\n".join(said)


def written(folder: Path, change: Any) -> str:
    """A copy of the model with other weights."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    change(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return str(folder)


def trained(model: Any) -> None:
    """Five steps of LoRA that make one response to some prompts likelier."""
    tokenizer, adapter = AutoTokenizer.from_pretrained(MODEL), LoraConfig(target_modules="all-linear")
    wrapped = get_peft_model(model, adapter)
    optimizer = torch.optim.AdamW((each for each in wrapped.parameters() if each.requires_grad), lr=3e-4)
    for record in RECORDS[:5]:
        turns = [{"role": turn.role, "content": turn.content} for turn in record.prompt]  # type: ignore[union-attr]
        turns.append({"role": "assistant", "content": "It is green."})
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.merge_and_unload()


def test_rounding_passes_and_ids_are_its_own(url: str) -> None:
    said = check(url, MODEL)
    assert "bf16 rounding makes" in said
    print(said)
    server = opened(url, MODEL)
    prompt = usable_prompt(RECORDS[0], server.responder, Sampling(8))
    assert not isinstance(prompt, str)
    requests = [Request(prompt.prompt_ids, "a", number) for number in range(3)]
    samples = server.generate(requests, Sampling(8))
    assert len({tuple(sample.ids) for sample in samples if sample}) > 1
    bad = Request(np.full(2049, 5, dtype=np.int32), "long", 0)
    assert server.generate([bad, requests[0]], Sampling(8))[0] is None


def test_another_prompt_is_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = opened(url, MODEL)
    whole = Server.complete
    system = len(server.responder.tokenizer(f"<|im_start|>system\n{SYSTEM.content}<|im_end|>\n")["input_ids"])

    def without_system(self: Server, ids: Any, *others: Any) -> Any:
        return [replace(each, prompt_tokens=None) for each in whole(self, ids[system:], *others)]

    monkeypatch.setattr(Server, "complete", without_system)
    with pytest.raises(ConfigError, match="other prompts") as caught:
        check_served(server, RECORDS, config(MODEL), CPU, Console(None))
    print(caught.value.got)


@pytest.mark.parametrize(
    ("change", "cause"),
    [(trained, "other weights"), (to_int8, "a quantised copy")],
)
def test_the_base_in_place_of_a_checkpoint_and_a_copy_are_caught(
    change: Any, cause: str, url: str, tmp_path: Path
) -> None:
    other = written(tmp_path / "other", change)
    with pytest.raises(ConfigError, match=cause) as caught:  # the base is served
        check(url, other)
    print(caught.value.got)
    command = json.dumps(["python3", "-c", RELOAD, url])[1:-1].replace('", "', '" "')
    for folder in (other, MODEL):
        source = find_files(folder, config(folder), "model.path")
        reload_server(ServerConfig(url=url, model="policy", reload=f"{command} {{model}}"), source)
        assert "bf16 rounding makes" in check(url, folder)


def test_names(url: str) -> None:
    responder: Responder = opened(url, MODEL).responder
    assert responder.longest == 2048
    with pytest.raises(ConfigError, match=r"status 404.*it lists policy"):
        open_server(ServerConfig(url=url, model="absent"), responder)


def test_an_adapter_on_experts_is_refused_and_its_merged_model_is_exact(tmp_path: Path) -> None:
    tokenizer = tiny.qwen()
    heads = {"num_attention_heads": 2, "head_dim": 32}
    sizes = heads | {"hidden_size": 64, "mlp_only_layers": [], "max_position_embeddings": 2048}
    base = tiny_causal_lm(tiny_config("qwen3_moe", len(tokenizer), **sizes))
    base.save_pretrained(tmp_path / "base")
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    lora = LoraConfig(r=8, target_modules=[], target_parameters=experts, init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    write_merged(
        tmp_path / "merged", tmp_path / "base", tmp_path / "adapter", torch.float32, trust_remote_code=False
    )
    for name in ("base", "merged"):
        tokenizer.save_pretrained(tmp_path / name)
    words = ["--dtype", "float32", "--enable-lora", "--lora-modules", f"own={tmp_path / 'adapter'}"]
    with (
        pytest.raises(AssertionError, match="fused 3D MoE weights"),
        serving(tmp_path / "base", tmp_path / "refused.txt", *words),
    ):
        pass
    ids = [3, 9, 4, 17, 5, 22, 11, 6]
    with serving(tmp_path / "merged", tmp_path / "merged.txt", "--dtype", "float32") as address:
        body = {"model": "policy", "prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 0}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}/completions", json.dumps(body).encode(), headers)
        answer = json.load(urllib.request.urlopen(request))
    served = answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(ids)]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        scores = merged(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    wanted = scores.gather(-1, torch.tensor(ids[1:])[:, None]).flatten()
    torch.testing.assert_close(torch.tensor(served), wanted, atol=2e-5, rtol=1e-5)
