"""Memory, time and disk of runs, each number by hand or by what it must not be below; and in words."""

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from dpo_dist.config.load import load_run_config
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.model.files.load import without_weights
from dpo_dist.model.flops import step_flops
from dpo_dist.tools.plan import __main__ as plan
from dpo_dist.tools.plan import make_plan as make_plan_module
from dpo_dist.tools.plan.estimate import Data, Estimate, choose_machine, estimate
from dpo_dist.tools.plan.make_plan import make_plan, planned_data
from dpo_dist.training.start.footprint import PROCESS_BYTES
from scripts import write_fits
from tests.support import tiny
from tests.support.doctor_data import agent_records, clean_pairs, write
from tests.support.families import tiny_config
from tests.support.launch import ROOT
from tests.support.tiny_model import write_model

pytestmark = pytest.mark.slow

SHAPE = {
    **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 4, "vocab_size": 32000},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False},
}
EMBEDDINGS = 2 * 32000 * 4096
NORMS = 9 * 4096
P = 4 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 11008) + EMBEDDINGS + NORMS
STEPS = 100
ADAPTER = ["parallelism=ddp", "model.adapter={r: 16}"]
BOTH = ["parallelism.offload_optimizer=cpu", "parallelism.offload_parameters=cpu"]


@cache
def configured(*words: str) -> RunConfig:
    given = [
        "model.path=m",
        "data.train=[hub/unknown]",
        "sampling.prompts=0",
        "trainer.global_batch_pairs=128",
    ]
    return load_run_config([*given, "plan.gpu=h100-80g", *words])


def data_of(*words: str) -> Data:
    config = load_run_config(words)
    return planned_data(config.plan, config.data, config.model, config.loss, lambda *_: nullcontext())


MODELS: dict[str, Any] = {}


def estimated(
    *words: str,
    gpus: int = 8,
    tokens: float = 700.0,
    saved: float = 0.0,
    kind: str = "llama",
    **options: Any,
) -> Estimate:
    config, data = configured(*words), Data(128 * STEPS, tokens, "", saved=saved)
    machine = choose_machine(config.plan, config.model.dtype)._replace(gpus=gpus)
    policy = replace(config.model, gradient_checkpointing="none")
    if (key := repr((policy, kind, options))) not in MODELS:
        MODELS[key] = without_weights(AutoConfig.for_model(kind, **SHAPE, **options), policy)
    return estimate(config, data, machine, MODELS[key])


@pytest.mark.parametrize(
    ("words", "gpus", "seconds"),
    [
        ("parallelism=zero2", 8, 4 * P / 250e9),  # gradients and weights
        ("parallelism=ddp", 8, 4 * P / 250e9),
        ("parallelism=ddp model.dtype=fp32", 8, 8 * P / 250e9),
        ("parallelism=zero2", 16, 6 * P / 50e9),  # gradients in float32
        ("parallelism=zero2", 1, 0.0),
        # 16 pairs a GPU, 11,200 tokens: three micro-batches, in each of which weights are gathered twice.
        ("trainer.micro_batch_tokens=4096", 8, 3 * 6 * P / 250e9),
        ("trainer.micro_batch_tokens=100", 8, 16 * 6 * P / 250e9),  # a pair is not divided
        ("trainer.micro_batch_tokens=4096", 16, 2 * 8 * P / 50e9),
        # Gradients in bf16 inside of a node; over two nodes once a step, in float32, out and back.
        (
            "trainer.micro_batch_tokens=4096 parallelism.shard_size=8",
            16,
            2 * 6 * P / 250e9 + 2 * 4 * P / 8 / 50e9,
        ),
        ("trainer.micro_batch_tokens=4096 parallelism.shard_size=8", 8, 3 * 6 * P / 250e9),
        ("parallelism=zero2 plan.network=25", 16, 6 * P / 25e9),
    ],
)
def test_seconds_of_a_step_in_which_weights_and_gradients_travel(
    words: str, gpus: int, seconds: float
) -> None:
    assert estimated(*words.split(), gpus=gpus).sending == pytest.approx(STEPS * seconds)


@pytest.mark.parametrize(
    ("words", "gpus", "seconds"),
    [
        ([], 8, 0.0),
        # Over PCIe gradients in float32 and weights; then 24 bytes of states, 4 of gradients, 2 of weights.
        (BOTH[:1], 8, 6 * P / 8 / 25e9 + 30 * P / 100e9),
        (BOTH, 8, (6 + 4) * P / 8 / 25e9 + 30 * P / 100e9),  # and weights, twice
        (BOTH, 16, (6 + 4) * P / 16 / 25e9 + 30 * P / 2 / 100e9),  # two hosts
        (["parallelism=zero2", BOTH[0], "trainer.ema_decay=0.9"], 8, 6 * P / 8 / 25e9 + 38 * P / 100e9),
    ],
)
def test_seconds_of_a_step_in_which_gpus_wait_for_their_host(
    words: list[str], gpus: int, seconds: float
) -> None:
    found = estimated(*words, gpus=gpus)
    assert found.times == 1
    assert found.on_host == pytest.approx(STEPS * seconds)


def test_training_is_three_forwards_and_what_is_computed_again() -> None:
    found = estimated("model.gradient_checkpointing=none")
    causal_lm = without_weights(AutoConfig.for_model("llama", **SHAPE), found.config.model)
    useful = (
        12_800 * step_flops(causal_lm).step(700, 490, 210**2 // 2 + 2 * 245 * 210 + 245**2) / (8 * 989e12)
    )
    assert found.computing == pytest.approx(useful, rel=1e-4)
    assert found.scoring == pytest.approx(useful / 3, rel=1e-4)
    assert found.launching == pytest.approx(STEPS * 4 * 1.2e-3)
    assert found.hooks == pytest.approx(STEPS * 4 * 5.7e-3), "of ZeRO-3"
    assert estimated("parallelism=zero2").hooks == 0
    whole = estimated("model.gradient_checkpointing=full")
    assert whole.computing == pytest.approx(4 / 3 * useful, rel=1e-4)
    assert whole.launching == pytest.approx(STEPS * 4 * 1.2e-3 * 4 / 3)
    assert estimated("model.dtype=fp32").computing > 14 * useful, "67 of 989 TFLOP/s"
    adapter = estimated(*ADAPTER)
    assert adapter.computing == pytest.approx(2 * adapter.scoring)
    kto = estimated("model.gradient_checkpointing=none", "loss=kto")
    for more, less in ((kto.computing, found.computing), (kto.scoring, found.scoring)):
        assert more == pytest.approx(less + useful / 3, rel=1e-4), "its partners"


@pytest.mark.parametrize(("kind", "of_weight"), [("nf4", 2 + 0.5 + 1 / 64 + 4 / 64 / 256), ("int8", 3.0)])
def test_quantized_weights_are_read_and_written_at_half_the_speed_of_the_memory(
    kind: str, of_weight: float
) -> None:
    """In forward, in backward, and where the forward is computed again."""
    seconds = of_weight * (P - EMBEDDINGS - NORMS) / 1.675e12
    for checkpointing, passes in (("none", 2), ("full", 3)):
        words = [f"model.quantization={kind}", f"model.gradient_checkpointing={checkpointing}"]
        assert estimated(*ADAPTER, *words).dequantizing == pytest.approx(STEPS * passes * seconds)


def test_samples_gather_once_under_zero3_and_are_little_elsewhere() -> None:
    samples = ["data.eval=[e]", "sampling.max_new_tokens=100", "trainer.eval_every=30", "sampling.prompts=8"]
    once = 2 * P / 250e9 + 100 * 4 * 3.3e-3
    assert estimated(*samples).sampling == pytest.approx(5 * once), "at the start, and at the end"
    assert estimated(*samples, "sampling.prompts=null").sampling == pytest.approx(2 * once)
    assert estimated().sampling == estimated("parallelism=ddp", *samples).sampling == 0


def test_tokens_that_prefixes_save_are_not_computed_and_take_their_memory() -> None:
    plain = estimated("trainer.micro_batch_tokens=4096")
    alike = estimated("trainer.micro_batch_tokens=4096", saved=0.5)
    assert (plain.times, alike.times) == (3, 2)
    assert plain.computing / 2 < alike.computing < 0.7 * plain.computing
    assert (alike.fits, alike.largest, alike.disk) == (plain.fits, plain.largest, plain.disk)
    assert alike.needs.total_bytes(4096) == plain.needs.total_bytes(4096)


def test_local_data_that_begin_alike_take_less_time(tmp_path: Path) -> None:
    """As many pairs of a step as a GPU has share what they begin with."""
    model, agents = write_model(tmp_path / "model"), write(tmp_path / "agents.jsonl", agent_records(64))
    words = [f"model.path={model}", "model.dtype=fp32", f"data.cache={tmp_path}/encoded"]
    words += ["plan.gpu=h100-80g", "trainer.global_batch_pairs=32"]

    def saved(*more: str) -> tuple[float, str]:
        config = load_run_config([*words, f"data.train=[{agents}]", *more])
        made = make_plan(config, lambda *_: nullcontext(lambda *_: None), suggests=False)
        [line] = [line for line in made.lines if line.startswith("an epoch of 64 pairs")]
        return made.content["saved_by_prefixes"], line

    share, line = saved("plan.gpus=1")
    assert 0.5 < share < 0.9
    assert f" tokens, {100 * share:.0f} % of them saved by shared prefixes (of data.train):" in line
    assert 0.5 < saved("plan.gpus=4")[0] < share
    clean = write(tmp_path / "clean.jsonl", clean_pairs(32))
    weighed = f"data.train=[{{path: {agents}, weight: 0.5}},{clean}]"
    assert 0.2 * share < saved("plan.gpus=1", weighed)[0] < share
    padded = write_model(tmp_path / "padded")
    small = tiny_config("gptj", len(tiny.qwen()))
    small.n_positions = 2048
    small.save_pretrained(padded)
    off, given = "trainer.prefix_tree=false", "plan.tokens_per_pair=300"
    for more in ("plan.gpus=32", off, given, f"model.path={padded}"):
        nothing, line = saved("plan.gpus=1", more)
        assert nothing < 0.01, more
        assert "prefixes" not in line


def test_a_teacher_that_reads_more_takes_longer(tmp_path: Path) -> None:
    """Its own prompts and its system message are counted, as tokens and as hours."""
    model = write_model(tmp_path / "model")
    pairs = clean_pairs(12)
    for pair in pairs[::2]:
        pair["teacher_prompt"] = pair["prompt"] * 3 + " and all the sea"
    words = [f"model.path={model}", "model.dtype=fp32", "loss=distill", f"teacher.path={model}"]
    words += [f"data.train=[{write(tmp_path / 'pairs.jsonl', pairs)}]", "plan.gpu=h100-80g"]

    def asking(*more: str) -> float:
        config = load_run_config([*words, f"data.cache={tmp_path}/encoded", *more])
        used = planned_data(
            config.plan,
            config.data,
            config.model,
            config.loss,
            lambda *_: nullcontext(lambda *_: None),
            systems=config.systems,
        )
        machine = choose_machine(config.plan, config.model.dtype)
        policy = without_weights(AutoConfig.from_pretrained(model), config.model)
        return estimate(config, used, machine, policy, policy).asking

    ignored = f"data.train=[{{path: {tmp_path}/pairs.jsonl, ignore: [teacher_prompt]}}]"
    longer = asking("teacher.system='You are a sailor who says yes to the sea.'")
    assert asking(ignored) < asking() < longer


def test_a_plan_says_whose_machine_it_is_for_and_no_fractions_of_a_second(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    given = [f"model.path={model}", "plan.pairs=100", "plan.tokens_per_pair=50"]

    def lines(*words: str) -> list[str]:
        return make_plan(load_run_config([*given, *words]), lambda *_: nullcontext(), suggests=False).lines

    assert "no GPU" in lines()[0]
    assert "on 8 GPUs (h100-80g)" in lines()[1]
    named = lines("plan.gpu=h100-80g")
    assert "no GPU" not in "".join(named)
    assert any(line.endswith("under 1 s") for line in named)
    assert not any("0.0" in line and line.endswith(" s") for line in named)


def test_phases_overlap_but_for_ddp_in_bf16_and_the_reference_is_scored_once() -> None:
    for words, together in (
        (["parallelism=ddp"], sum),
        (["parallelism=ddp", "model.dtype=fp32"], max),
        ([], max),
    ):
        found = estimated(*words)
        training = 2 * (together((found.computing / 0.4, found.sending)) + found.hooks)
        assert found.seconds(0.4, 2.0)["training"] == pytest.approx(training)
        once = found.seconds(0.4)["reference, once for all runs"]
        assert found.seconds(0.4, 2.0)["reference, once for all runs"] == once > 0
    adapter = estimated(*ADAPTER)
    assert adapter.seconds(0.4, 2.0)["reference"] == 2 * adapter.seconds(0.4)["reference"]
    assert list(estimated("loss=simpo").seconds(0.4)) == ["training"]


def test_hours_of_all_gpus() -> None:
    found = estimated("trainer.epochs=2", "loss=simpo").hours()
    assert found["run_seconds"] == [2 * end for end in found["epoch_seconds"]]
    steps = estimated("trainer.max_steps=10", "loss=simpo").hours()
    assert steps["run_seconds"] == [pytest.approx(end / 10) for end in found["epoch_seconds"]]


@pytest.mark.parametrize(("gpus", "tokens"), product((1, 64), (90.0, 9e3)))
def test_nothing_is_faster_by_more_work(gpus: int, tokens: float) -> None:
    for base, more in (
        *(([], offload) for offload in ([BOTH[0]], [BOTH[1]], BOTH, ["model.dtype=fp32"])),
        (ADAPTER, ["model.quantization=nf4"]),
    ):
        found = [estimated(*base, *words, gpus=gpus, tokens=tokens).seconds(0.3) for words in ([], more)]
        less, longer = map(list, map(dict.values, found))
        assert all(slow >= 0.999 * fast for slow, fast in zip(longer, less, strict=True))
        assert sum(longer) > sum(less)


def test_larger_micro_batches_beside_offloaded_weights_are_no_gain() -> None:
    plain, offloaded = (estimated("plan.gpu=rtx4090-24g", *words, gpus=2) for words in ([], BOTH))
    assert plain.fits
    assert (plain.largest or 0) < (offloaded.largest or 0)
    assert plain.times == offloaded.times > 1


def test_experts_take_longer_than_a_dense_model_of_their_active_size() -> None:
    experts = estimated(kind="mixtral", num_local_experts=8, num_experts_per_tok=1)
    dense = estimated()
    assert experts.computing == pytest.approx(1.5 * dense.computing, rel=1e-3)
    assert experts.shapes.weights > 4 * dense.shapes.weights


@pytest.mark.parametrize(
    ("words", "host", "disk"),
    [
        ([], 14 * P, {"a checkpoint": 12 * P, "the model": 2 * P, "the log-probs": 12_800 * 490 * 4}),
        (["model.dtype=fp32", "loss=simpo"], 16 * P, {"a checkpoint": 12 * P, "the model": 4 * P}),
        ([*BOTH, "reference=live"], 20 * P, {"a checkpoint": 12 * P, "the model": 2 * P}),
    ],
)
def test_bytes_of_hosts_and_disks(words: list[str], host: float, disk: dict[str, float]) -> None:
    found = estimated(*words)
    of_processes = 8 * PROCESS_BYTES
    assert (found.host - of_processes, found.disk) == (pytest.approx(host), pytest.approx(disk))
    assert estimated(*words, gpus=16).host < found.host
    fewer = found.host - estimated(*words, gpus=2).host
    assert fewer == pytest.approx(6 * PROCESS_BYTES), "one process for each GPU"
    # One of several copies is written, and each of them is offloaded.
    assert estimated(*words, "parallelism.offload_optimizer=none", gpus=8).host == pytest.approx(
        estimated(*words, "parallelism.offload_optimizer=none", "parallelism.shard_size=8", gpus=16).host
    )


def test_an_adapter_writes_itself_and_a_quantized_base_keeps_what_is_not_linear() -> None:
    found = estimated(*ADAPTER)
    assert found.disk == pytest.approx(
        {"a checkpoint": 12 * found.shapes.trained, "the model": 2 * found.shapes.trained}
    )
    assert found.shapes.weights - found.shapes.trained == P
    quantized = estimated(*ADAPTER, "model.quantization=nf4")
    nf4 = 0.5 + 1 / 64 + 4 / 64 / 256
    expected = nf4 * (P - EMBEDDINGS - NORMS) + 2 * (EMBEDDINGS + NORMS) + 2 * found.shapes.trained
    assert quantized.needs.parts["weights"] == pytest.approx(expected)


def test_an_unknown_architecture_has_the_usual_micro_batch() -> None:
    found = estimated(kind="gemma2", attn_logit_softcapping=50.0, head_dim=128)
    assert (found.largest, found.micro_batch, found.times) == (None, 8192, 2)


def planned(*words: str, suggests: bool = False) -> tuple[str, dict[str, Any]]:
    given = ["plan.pairs=12800", "plan.tokens_per_pair=700"]
    config = load_run_config([*given, "plan.gpu=h100-80g", *words])
    made = make_plan(config, lambda *_: nullcontext(), suggests=suggests)
    return "\n".join(made.lines), made.content


@pytest.mark.parametrize(
    ("experiment", "weights", "gpus", "code"),
    [("qwen7b", 7.616e9, 2, 1), ("qwen3_0_6b", 0.596e9, 1, 0)],
)
def test_a_shipped_experiment_is_planned_offline(
    experiment: str,
    weights: float,
    gpus: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """18 bytes a weight, sharded over all GPUs; 20 by `ddp` on one."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = [f"+experiment={experiment}", f"plan.gpus={gpus}", "console.style=json"]
    assert plan.main(load_run_config(words)) == code
    [line] = [line for line in capsys.readouterr().out.splitlines() if '"plan"' in line]
    found = json.loads(line)
    sharded = sum(found["bytes"][name] for name in ("weights", "gradients", "optimizer states"))
    assert sharded == pytest.approx((20 if gpus == 1 else 18) * weights / gpus, rel=1e-3)
    assert found["fits"] is (code == 0)


def test_experts_in_4_bits_take_what_users_expect(tmp_path: Path) -> None:
    """The shape of Qwen3-30B-A3B, as on docs/scaling.md."""
    AutoConfig.for_model(
        "qwen3_moe",
        **{"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768},
        **{"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
        **{"num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151_936},
        max_position_embeddings=40_960,
    ).save_pretrained(tmp_path)
    words = [f"model.path={tmp_path}", "plan.gpus=1", "parallelism=ddp", "model.adapter={r: 64, alpha: 128}"]
    _, whole = planned(*words)
    assert whole["bytes"]["weights"] / 2**30 == pytest.approx(57.0, abs=0.05)
    assert "experts of a layer" not in whole["bytes"]
    card = ["plan.gpu=rtx4090-24g", "reference=adapter", "model.gradient_checkpointing=full"]
    attention = "model.adapter.target_modules=[q_proj,k_proj,v_proj,o_proj]"
    assert planned(*words, "model.quantization=nf4", attention, *card)[1]["fits"]
    text, packed = planned(*words, "model.quantization=nf4")
    assert packed["bytes"]["weights"] / 2**30 == pytest.approx(15.6, abs=0.05)
    assert packed["bytes"]["experts of a layer"] == 2 * 128 * 3 * 768 * 2048
    assert "warning" not in text


MIXTURE = {
    **{"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1},
    "head_dim": 128,
}


def test_a_teacher_is_asked_once_or_stands_beside_the_policy() -> None:
    """By hand: the distributions of a chosen response in bytes, its forward in seconds, its weights."""
    words = ["model=qwen2_5_0_5b", "loss=distill", "teacher.path=Qwen/Qwen2.5-7B-Instruct", "plan.gpus=2"]
    words += ["plan.pairs=1000", "plan.tokens_per_pair=700", "parallelism=ddp"]
    text, plain = planned(*words)
    _, other = planned(*words, "teacher.k=100")
    taken = [each["disk_bytes"]["the teacher's distributions"] for each in (plain, other)]
    assert taken[0] == pytest.approx(4 * (2 * 48 + 16 + 2) * 1000 * 0.7 * 700 / 2)
    assert taken[1] / taken[0] == pytest.approx((2 * 100 + 16 + 2) / 114)
    assert "teacher, once for all runs" in text
    beside, live = planned(*words, "teacher.mode=live")
    assert live["bytes"]["teacher"] == pytest.approx(2 * 7.616e9 / 2, rel=0.01)  # of two GPUs
    assert "the teacher's distributions" not in live["disk_bytes"]
    assert "once for all runs" not in beside
    seconds = [each["run_seconds"][0] for each in (plain, live)]
    assert seconds[0] == pytest.approx(seconds[1])
    _, longer = planned(*words, "trainer.epochs=3")
    _, beside_longer = planned(*words, "trainer.epochs=3", "teacher.mode=live")
    forward = 2 * 7.6e9 * 1000 * (0.3 + 0.7 / 2) * 700 / (2 * 989e12 * 0.38)
    saved = beside_longer["run_seconds"][0] - longer["run_seconds"][0]
    assert saved == pytest.approx(2 * forward, rel=0.1)
    assert "teacher" not in planned(*words[:1], *words[3:])[1]["bytes"]


def test_tokens_travel_in_place_of_experts() -> None:
    words = ["trainer.micro_batch_tokens=4096", "model.gradient_checkpointing=full"]
    plain = estimated(*words, kind="qwen3_moe", gpus=16, **MIXTURE)
    shared = estimated(*words, "parallelism.experts=8", kind="qwen3_moe", gpus=16, **MIXTURE)
    weights, experts = plain.shapes.weights, plain.shapes.experts
    assert experts == 4 * 16 * 3 * 64 * SHAPE["hidden_size"]
    assert plain.sending == pytest.approx(STEPS * 2 * 8 * weights / 50e9)
    assert plain.exchanging == 0
    # Two ranks have equal experts, an eighth of all.
    assert shared.sending == pytest.approx(STEPS * 2 * 8 * (weights - experts + experts / 8) / 50e9)
    tokens, numbers = STEPS * 128 * 700 / 16, 4 * 2 * SHAPE["hidden_size"]
    # There and back, in forward, in backward, and where a layer is computed again; 7 of 8 in another process.
    assert shared.exchanging == pytest.approx(6 * tokens * numbers * 2 * 7 / 8 / 250e9)
    parts = ("weights", "gradients", "optimizer states")
    assert all(shared.needs.parts[part] == pytest.approx(plain.needs.parts[part]) for part in parts)
    packed = estimated(
        *words,
        *ADAPTER,
        "model.quantization=int8",
        "parallelism.experts=8",
        kind="qwen3_moe",
        gpus=8,
        **MIXTURE,
    )
    alone = estimated(*words, *ADAPTER, "model.quantization=int8", kind="qwen3_moe", gpus=8, **MIXTURE)
    saved = alone.needs.parts["weights"] - packed.needs.parts["weights"]
    assert saved == pytest.approx(experts * 7 / 8), "a byte for each of the others'"
    adapter = estimated(*words, ADAPTER[1], "parallelism.experts=8", kind="qwen3_moe", gpus=16, **MIXTURE)
    frozen = adapter.shapes.weights - experts
    assert adapter.needs.parts["weights"] == pytest.approx(2 * (frozen / 16 + experts / 8))
    live = estimated(
        *words, "reference.mode=live", "parallelism.experts=8", kind="qwen3_moe", gpus=16, **MIXTURE
    )
    assert live.needs.parts["reference"] == pytest.approx(2 * ((weights - experts) / 16 + experts / 8))
    assert adapter.sending == pytest.approx(STEPS * 2 * (4 * frozen + 4 * adapter.shapes.trained) / 50e9)


def test_a_layer_above_what_zero3_gathers_at_once_is_whole() -> None:
    large = MIXTURE | {"num_experts": 64, "moe_intermediate_size": 2048}
    found = estimated(kind="qwen3_moe", **large)
    layer = (found.shapes.weights - EMBEDDINGS - 4096) / 4
    assert layer > 1e9
    assert found.needs.parts["gathered weights"] == pytest.approx(2 * layer)


def test_hours_are_told_of_what_fits_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text, content = planned("+experiment=qwen7b", "plan.gpus=1")
    assert text.splitlines()[-2].startswith("does not fit: there is room for micro-batches of 0 tokens")
    assert {"epoch_seconds", "run_seconds"}.isdisjoint(content)
    text, _ = planned("+experiment=qwen7b", "plan.gpus=8", "loss=simpo", "reference=none")
    assert "log-probs" not in text
    assert "disk: 85.1 GiB a checkpoint, 14.2 GiB the model\n" in text
    assert "communication-bound" not in text
    text, _ = planned("+experiment=qwen7b", "plan.gpus=64")
    assert "communication-bound" in text


def shape(folder: Path, kind: str = "qwen2", **sizes: int) -> str:
    """A model without weights: `model.path=FOLDER`."""
    AutoConfig.for_model(kind, max_position_embeddings=131_072, **sizes).save_pretrained(folder)
    return f"model.path={folder}"


LARGE = {  # of Qwen2.5-32B
    **{"hidden_size": 5120, "intermediate_size": 27_648, "num_hidden_layers": 64, "vocab_size": 152_064},
    **{"num_attention_heads": 40, "num_key_value_heads": 8},
}
FULL = "model.gradient_checkpointing=full"


def test_where_nothing_fits_what_needs_less_is_named(tmp_path: Path) -> None:
    words = [shape(tmp_path, **LARGE), "plan.gpu=rtx4090-24g", "plan.gpus=1"]
    text, content = planned(*words, suggests=True)
    assert content["suggested"] is None
    assert text.splitlines()[-1].startswith("nothing fits: more GPUs (plan.gpus), ")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("plan.gpus=7 parallelism.experts=7", "parallelism.experts"),
        ("plan.gpus=12 parallelism.shard_size=8", "parallelism.shard_size"),
        ("plan.gpus=6 parallelism.sequence_parallel=3", "parallelism.sequence_parallel"),
    ],
)
def test_what_a_start_refuses_is_refused(words: str, key: str, tmp_path: Path) -> None:
    path = shape(tmp_path, "qwen3_moe", num_experts=128, num_attention_heads=32, num_key_value_heads=4)
    with pytest.raises(ConfigError) as raised:
        planned(path, *words.split())
    assert raised.value.where == key


def test_inputs_of_layers_that_wait_on_the_host_are_counted_there() -> None:
    checkpointed = ["model.gradient_checkpointing=full", "trainer.micro_batch_tokens=4096"]
    kept, offloaded = (estimated(*checkpointed, *words) for words in ([], ["model.activation_offload=true"]))
    inputs = 3 * 2 * 4096  # bytes of a token: all layers but the one that computes, in bf16
    assert (kept.needs.per_token or 0) - (offloaded.needs.per_token or 0) == pytest.approx(inputs)
    assert offloaded.host - kept.host == pytest.approx(8 * 4096 * inputs)
    copied = 12_800 * 700 / 8 * inputs
    assert offloaded.on_host - kept.on_host == pytest.approx(2 * copied / 25e9)
    some = estimated("model.gradient_checkpointing=2", "model.activation_offload=true")
    without = estimated("model.gradient_checkpointing=2")
    assert (without.needs.per_token or 0) - (some.needs.per_token or 0) == pytest.approx(2 * 4096)


def test_the_bytes_are_those_of_the_longest_pair(tmp_path: Path) -> None:
    sizes = LARGE | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    words = [shape(tmp_path, **sizes | {"num_attention_heads": 16}), "plan.gpus=1", "parallelism=ddp", FULL]
    _, short = planned(*words)
    text, long = planned(*words, "data.max_length=100000")
    assert short["micro_batch_tokens"] == long["micro_batch_tokens"] == 32_768
    assert "  100,000 tokens, the longest pair  " in text
    ratio = long["bytes"]["micro-batch"] / short["bytes"]["micro-batch"]
    assert ratio == pytest.approx(100_000 / 32_768)


def test_the_table_of_what_fits_is_that_of_plan() -> None:
    assert write_fits.README.read_text() == write_fits.readme(), "run scripts/write_fits.py"


SMALL = [
    *("+experiment=qwen3_0_6b", "parallelism=ddp", "model.quantization=nf4", "model.adapter={r: 16}"),
    *("plan.gpus=1", "data.max_length=40000"),
]


def test_what_is_suggested_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    machine = ["+experiment=qwen7b", "plan.gpus=8", "plan.gpu=a100-40g", "data.max_length=4096"]
    content = planned(*machine, "model.gradient_checkpointing=none", suggests=True)[1]
    assert not content["fits"]
    assert planned(*machine, *content["suggested"].split(), "trainer.micro_batch_tokens=auto")[1]["fits"]
    alone = ["+experiment=qwen7b", "plan.gpus=1"]
    offloaded = planned(*alone, "parallelism=zero3_offload", suggests=True)[1]["suggested"]
    assert offloaded.startswith("parallelism=zero3_offload"), "without offload it does not fit"
    assert planned(*SMALL)[1]["fits"], "also above the largest micro-batch that `auto` chooses"
    lora = planned("+experiment=qwen7b_lora", "plan.gpus=1", "plan.gpu=rtx4090-24g", suggests=True)[1]
    assert not lora["fits"]
    assert lora["suggested"] == "parallelism=ddp model.gradient_checkpointing=full"


@pytest.mark.parametrize("offloads", [True, False], ids=["only offloaded", "not at all"])
def test_adamw_in_bf16_is_named_where_it_alone_fits(
    offloads: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kinds = ("zero3", "zero3_offload") if offloads else ("zero3",)
    monkeypatch.setattr(make_plan_module, "_KINDS", kinds)
    words = [
        shape(tmp_path, **SHAPE | {"num_hidden_layers": 6}),
        "plan.gpu=rtx4090-24g",
        "plan.gpus=1",
    ]
    text, content = planned(*words, suggests=True)
    assert not content["fits"]
    last = text.splitlines()[-1]
    before = "or on the GPUs alone: " if offloads else "nothing fits but: "
    assert last.startswith(f"{before}optim.kind=adamw_bf16 parallelism=zero3 ")
    settings = last.removeprefix(before).split()
    assert planned(*words, *settings, "trainer.micro_batch_tokens=auto")[1]["fits"]


def test_long_texts_are_given_the_keys_that_save_activations_where_nothing_else_fits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(make_plan_module, "_KINDS", ("zero3",))
    words = [shape(tmp_path, **SHAPE | {"num_hidden_layers": 32}), "plan.gpu=a100-80g", "plan.gpus=3"]
    keys = []
    for tokens in (90_000, 120_000):
        of_length = [*words, f"data.max_length={tokens}"]
        suggested = planned(*of_length, suggests=True)[1]["suggested"]
        keys.append([key for key in ("activation_offload", "tiled_mlp") if key in suggested])
        assert planned(*of_length, *suggested.split(), "trainer.micro_batch_tokens=auto")[1]["fits"]
    assert keys == [["activation_offload"], ["activation_offload", "tiled_mlp"]]


def test_over_nodes_weights_are_whole_in_a_node_if_they_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["plan.gpus=64", "plan.network=25", "trainer.global_batch_pairs=128"]
    small = planned("+experiment=qwen7b", *words, suggests=True)[1]["suggested"]
    assert small.startswith("parallelism=zero3 parallelism.shard_size=8 ")
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128_256}
    AutoConfig.for_model("llama", **sizes, **heads).save_pretrained(tmp_path)
    large = planned("+experiment=qwen7b", f"model.path={tmp_path}", *words, suggests=True)[1]["suggested"]
    assert large.startswith("parallelism=zero3 model."), "a node has no room for all states"


RECIPES = {
    "olmo3_7b": (258_622, 900),  # but for the evaluated share
    "qwen3_0_6b": (59_699, 700),
    "qwen7b": (62_135, 700),
    "qwen7b_sft": (62_135, 455),  # a prompt with one response
    "smollm3": (168_500, 2098),  # half of a part, and a quarter of another
    "tulu3_8b": (270_052, 900),
    "zephyr7b": (61_135, 700),
}


@pytest.mark.parametrize(
    "file", sorted((ROOT / "conf/experiment").glob("*.yaml")), ids=lambda file: file.stem
)
def test_recipes_know_the_size_of_their_data(file: Path) -> None:
    content = yaml.safe_load(file.read_text())
    if file.stem in RECIPES:
        data = data_of(f"+experiment={file.stem}")
        assert (data.pairs, round(data.tokens)) == RECIPES[file.stem]
        assert data.basis.startswith("by the cards of the data")
    else:
        assert file.stem in ("smoke", "qwen7b_lora") or "${run.root}" in str(content["data"]["train"])


def test_data_that_no_card_is_known_of_are_assumed() -> None:
    data = data_of("model.path=m", "data.train=[hub/unknown]")
    assert data == Data(60_000, 700, "assumed; set plan.pairs and plan.tokens_per_pair")
    some = ["data.train=[{path: Anthropic/hh-rlhf, limit: 100, weight: 3}]", "plan.tokens_per_pair=50"]
    assert data_of("model.path=m", *some)[:2] == (300, 50)
