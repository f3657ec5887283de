"""The parts of DeepSpeed and Accelerate that they do not document do here what this package relies on.

Engines are real, of one process.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from deepspeed.comm.torch import build_shm_op
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder
from torch import Tensor
from torch.nn.functional import linear
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from dpo_dist.batching.costs import Arrangement
from dpo_dist.config.schema import (
    AttentionBackend,
    Dtype,
    OptimConfig,
    OptimizerKind,
    ParallelismConfig,
    ParallelismKind,
)
from dpo_dist.distributed.deepspeed_config import policy_config
from dpo_dist.distributed.deepspeed_internals import (
    drop_gradients,
    expert_gradient_sums,
    flat_masters,
    forget_process_group,
    gathered_once,
    gradient_sums,
    inner_optimizer,
    is_sharded,
    join_masters,
    keep_from_broadcast,
    optimizer_tensors,
    own_accelerate_state,
    record_gather_orders,
    reduce_in_optimizer_only,
    release_gathered,
    restore_linear,
    restore_powers,
    set_learning_rate,
    set_loss_scale,
    shard_of,
    shard_range,
    shard_slice,
    sharded_over,
    timeout_of,
    use_gloo_all_reduce,
    whole_numel,
    write_masters_to_model,
)
from dpo_dist.distributed.processes.failures import Reports
from dpo_dist.distributed.processes.join import join_world, leave_world, start_world
from dpo_dist.distributed.processes.world import ExpertGroup
from dpo_dist.model.files.load import TORCH_DTYPES
from dpo_dist.model.library_internals import describe_slice, whole_shape
from dpo_dist.model.packed import PackedCausalLM
from tests.support.cpu_adam import CPUAdamInPyTorch
from tests.support.families import tiny_family
from tests.support.packing import pack_unkeyed, random_pairs
from tests.support.precision import NEEDS_FP16

pytestmark = pytest.mark.slow

BATCH = pack_unkeyed(random_pairs([(7, 5, 9)]))


def tiny() -> Any:
    torch.manual_seed(0)
    return tiny_family("llama")


@contextlib.contextmanager
def made(
    kind: str, dtype: Dtype = Dtype.fp32, optim: OptimConfig | None = None
) -> Iterator[tuple[Any, PackedCausalLM]]:
    """An engine of a tiny model and AdamW, with the model. ZeRO-3 keeps vectors only gathered."""
    config = policy_config(ParallelismConfig(kind=ParallelismKind(kind)), optim or OptimConfig(), dtype)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    causal_lm = tiny()
    with join_world(config, 60, Reports()) as world:
        model = PackedCausalLM(causal_lm, AttentionBackend.sdpa, arrangement=Arrangement.padded)
        model.to(TORCH_DTYPES[dtype])
        engine, _ = world.accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        yield engine, model


def backward(engine: Any) -> None:
    engine.train()
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(-engine(BATCH).sum())


@pytest.mark.parametrize(
    ("kind", "dtype"), [("ddp", Dtype.bf16), ("zero2", Dtype.fp32), ("zero3", Dtype.fp32)]
)
@pytest.mark.parametrize("largest", [None, 0.5])
def test_gradients_are_clipped_to_the_largest_norm_if_there_is_one(
    kind: str, dtype: Dtype, largest: float | None
) -> None:
    squares = []
    with made(kind, dtype, OptimConfig(max_grad_norm=largest)) as (engine, _):
        inner_optimizer(engine).register_step_pre_hook(
            lambda inner, *_: squares.extend(
                weight.grad.square().sum().item()
                for group in inner.param_groups
                for weight in group["params"]
            )
        )
        backward(engine)
        engine.step()
        norm = float(engine.get_global_grad_norm())
    assert norm > 1
    assert sum(squares) ** 0.5 == pytest.approx(largest or norm, rel=1e-3)


def test_zero_3_shards_every_weight_and_the_master_weights_are_slices() -> None:
    whole = {f"causal_lm.{name}": weight for name, weight in tiny().named_parameters()}
    with made("zero3") as (engine, model):
        assert type(engine.optimizer).__name__ == "DeepSpeedZeroOptimizer_Stage3"
        weights = dict(model.named_parameters())
        ranges = {weight: rest for _, each in flat_masters(engine) for weight, *rest in each}
        flats = {weight: flat for flat, each in flat_masters(engine) for weight, *_ in each}
        for name, weight in weights.items():
            assert is_sharded(weight)
            assert whole_shape(weight) == tuple(whole[name].shape)
            assert whole_numel(weight) == whole[name].numel()
            assert shard_range(weight) == (0, whole_numel(weight))
            shard = shard_of(weight)
            assert shard is not None
            assert torch.equal(shard.view(-1)[: whole_numel(weight)], whole[name].view(-1))
            start, first, length = ranges[weight]
            assert (first, length) == (0, whole_numel(weight))
            assert torch.equal(flats[weight].narrow(0, start, length), whole[name].view(-1))


def test_a_group_shards_weights_and_slices_of_experts_with_their_gradients() -> None:
    config = policy_config(ParallelismConfig(), OptimConfig(), Dtype.fp32)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    torch.manual_seed(0)
    causal_lm = tiny_family("qwen3_moe")
    with join_world(config, 60, Reports()) as world:
        group = dist.new_group([0])
        with sharded_over(group):
            deepspeed.zero.Init(module=causal_lm, config_dict_or_path=config)
        assert all(weight.ds_process_group is group for weight in causal_lm.parameters())
        experts = causal_lm.model.layers[1].mlp.experts
        weight = experts.down_proj
        with deepspeed.zero.GatheredParameters([weight]):
            piece = torch.nn.Parameter(weight.data.clone())
        describe_slice(piece, (8, *piece.shape[1:]), 4)
        shard_slice(weight, piece, ExpertGroup(0, 1, group, group, group))
        experts.down_proj = piece
        assert shard_of(weight) is None
        assert whole_shape(piece) == (8, *piece.ds_shape[1:])
        assert shard_range(piece) == (piece.ds_numel, piece.ds_numel), "the second half of the whole"

        model = PackedCausalLM(causal_lm, AttentionBackend.sdpa, arrangement=Arrangement.padded)
        engine, _ = world.accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        backward(engine)
        [of_experts] = expert_gradient_sums(engine)
        assert of_experts.numel() == piece.ds_numel
        assert of_experts.abs().sum() > 0
        sums = gradient_sums(engine)
        assert sums.numel() == sum(map(whole_numel, causal_lm.parameters()))
        sums.zero_()
        assert of_experts.abs().sum() == 0, "a part of the others"


def test_a_weight_may_keep_its_values_where_deepspeed_sends_those_of_rank_0(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = policy_config(ParallelismConfig(kind=ParallelismKind.ddp), OptimConfig(), Dtype.fp32)
    causal_lm = tiny()
    own = causal_lm.lm_head.weight
    keep_from_broadcast(own)
    sent = list[int]()
    monkeypatch.setattr(deepspeed.comm, "broadcast", lambda tensor, *_, **__: sent.append(tensor.data_ptr()))
    with join_world(config, 60, Reports()) as world:
        model = PackedCausalLM(causal_lm, AttentionBackend.sdpa, arrangement=Arrangement.padded)
        world.accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    assert sent
    assert own.data_ptr() not in sent


def test_a_weight_without_shards_is_itself() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    assert (is_sharded(weight), shard_of(weight)) == (False, None)
    assert (whole_shape(weight), whole_numel(weight)) == ((2, 3), 6)


@pytest.mark.parametrize(
    ("kind", "dtype", "name"),
    [
        ("zero3", Dtype.fp32, "DeepSpeedZeroOptimizer_Stage3"),
        ("zero2", Dtype.fp32, "DeepSpeedZeroOptimizer"),
        ("ddp", Dtype.bf16, "BF16_Optimizer"),
    ],
)
def test_the_inner_optimizer_updates_master_weights_which_are_written_to_the_model(
    kind: str, dtype: Dtype, name: str
) -> None:
    with made(kind, dtype) as (engine, model):
        assert type(engine.optimizer).__name__ == name
        inner, masters = inner_optimizer(engine), [flat for flat, _ in flat_masters(engine)]
        assert type(inner) is torch.optim.AdamW
        assert all(master.dtype is torch.float32 for master in masters)
        held = {id(tensor) for tensors in optimizer_tensors(engine) for tensor in tensors_in(tensors)}
        assert {id(master) for master in masters} <= held

        before = [master.detach().clone() for master in masters]
        set_learning_rate(engine, 0.0)
        backward(engine)
        engine.step()
        assert all(map(torch.equal, before, masters)), "the learning rate is 0"
        set_learning_rate(engine, 0.1)
        backward(engine)
        engine.step()
        assert not any(map(torch.equal, before, masters))
        assert all({"exp_avg", "exp_avg_sq"} <= inner.state[master].keys() for master in masters)

        for master in masters:
            master.detach().fill_(0.25)
        write_masters_to_model(engine)
        for weight in model.parameters():
            shard = shard_of(weight)
            assert ((weight if shard is None else shard.view(-1)[: whole_numel(weight)]) == 0.25).all()


@pytest.mark.parametrize("kind", ["zero3", "zero2", "ddp"])
def test_the_optimizer_can_update_the_weights_of_the_model_itself(kind: str) -> None:
    with made(kind, Dtype.bf16, OptimConfig(OptimizerKind.adamw_bf16)) as (engine, model):
        masters = [flat for flat, _ in flat_masters(engine)]
        assert {master.dtype for master in masters} == {torch.bfloat16}

        def storages(tensors: Iterable[Tensor]) -> set[int]:
            return {tensor.untyped_storage().data_ptr() for tensor in tensors}

        shards = [shard_of(weight) for weight in model.parameters()]
        weights = [
            weight if shard is None else shard
            for weight, shard in zip(model.parameters(), shards, strict=True)
        ]
        assert storages(masters).isdisjoint(storages(weights)), "else join_masters has nothing to do"
        join_masters(engine)
        assert storages(masters) <= storages(weights)
        for value in (0.25, 0.5):
            for master in masters:
                master.detach().fill_(value)
            assert all((weight == value).all() for weight in weights)
            set_learning_rate(engine, 0.1)
            backward(engine)
            engine.step()
            assert not all((weight == value).all() for weight in weights)
            assert storages(masters) <= storages(weights)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


@NEEDS_FP16
def test_the_next_loss_is_multiplied_by_the_scale() -> None:
    with made("zero2", Dtype.fp16) as (engine, _):
        slopes = []
        for scale in (4.0, 64.0):
            set_loss_scale(engine, scale)
            loss = engine(BATCH).sum()
            loss.register_hook(lambda slope: slopes.append(float(slope)))
            engine.set_gradient_accumulation_boundary(False)
            engine.backward(loss)
        assert slopes == [4.0, 64.0]


@pytest.mark.parametrize("kind", ["ddp", "zero2"])
def test_only_zero_1_in_bf16_reduces_after_backward(kind: str) -> None:
    with made(kind, Dtype.bf16) as (engine, _):
        assert engine.enable_backward_allreduce
        reduce_in_optimizer_only(engine)
        assert engine.enable_backward_allreduce is (kind == "zero2")


def test_gradients_of_zero_2_are_dropped() -> None:
    with made("zero2", Dtype.bf16) as (engine, _):
        backward(engine)
        assert any(map(list, filter(None, engine.optimizer.averaged_gradients.values())))
        drop_gradients(engine)
        assert not any(engine.optimizer.averaged_gradients.values())


def test_the_powers_of_betas_are_those_after_as_many_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPUAdamBuilder, "load", lambda *_, **__: CPUAdamInPyTorch())

    def adam() -> tuple[Any, Tensor]:
        weight = torch.nn.Parameter(torch.ones(8))
        weight.grad = torch.ones(8)
        return DeepSpeedCPUAdam([weight], lr=0.1), weight

    trained, first = adam()
    for _ in range(50):  # after so many, a product of float32 is not the power
        trained.step()
    resumed, second = adam()
    first.data.zero_()  # the next update is not rounded to a large weight
    second.data.zero_()
    resumed.state[second] = {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in trained.state[first].items()
    }
    restore_powers(resumed, 50)
    trained.step()
    resumed.step()
    assert torch.equal(first, second)


def test_gathered_weights_stay_for_the_block_and_each_kind_of_forward_has_its_order() -> None:
    with made("zero3") as (engine, model):
        record_gather_orders(engine)
        large = [weight for weight in model.parameters() if not weight.ds_persist]

        def are_whole() -> set[bool]:
            return {tuple(weight.shape) == whole_shape(weight) for weight in large}

        engine.eval()
        with torch.no_grad():
            expected = engine(BATCH)
            assert are_whole() == {False}
            with gathered_once(engine):
                assert torch.equal(engine(BATCH), expected)
                assert are_whole() == {True}
            assert are_whole() == {False}
        for _ in range(3):  # the first records, the next ones prefetch
            backward(engine)
            engine.eval()
            with torch.no_grad():
                assert torch.equal(engine(BATCH), expected)

        small = [weight for weight in model.parameters() if weight.ds_persist]
        assert {tuple(weight.shape) == whole_shape(weight) for weight in small} == {True}
        release_gathered(small)
        assert not any(weight.numel() for weight in small)


def test_a_sharded_model_replaces_linear_until_it_is_restored() -> None:
    with made("zero3"):
        tiny()  # as loading, this makes shards
        assert torch.nn.functional.linear is not linear
        restore_linear()
        assert torch.nn.functional.linear is linear


def test_a_process_group_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1" if name.endswith("SIZE") else "0")
    with own_accelerate_state():
        start_world(policy_config(ParallelismConfig(), OptimConfig(), Dtype.fp32), 60)
        assert deepspeed.comm.is_initialized()
        assert timeout_of(torch.distributed.group.WORLD).total_seconds() == 60
        torch.distributed.destroy_process_group()
        assert deepspeed.comm.comm.cdb is not None, "DeepSpeed forgets it by itself: remove our part here"
        forget_process_group()
        assert deepspeed.comm.comm.cdb is None
        leave_world()


def test_accelerators_of_a_script_live_on_beside_a_state_of_our_own() -> None:
    theirs = PartialState(cpu=True)
    with own_accelerate_state():
        assert not PartialState._shared_state
        assert theirs.device.type == "cpu"
        config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
        assert is_deepspeed_zero3_enabled()
    assert vars(PartialState()) is vars(theirs)
    assert not is_deepspeed_zero3_enabled(), config


def test_deepspeed_builds_no_all_reduce_of_its_own() -> None:
    use_gloo_all_reduce()
    assert build_shm_op() is None
