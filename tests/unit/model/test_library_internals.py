"""The parts of transformers, peft and Liger that they do not document do here what this package relies on."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    modeling_utils,
)
from transformers.core_model_loading import Transpose
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from dpo_dist.model.architectures import UNPACKABLE, WITH_STATES
from dpo_dist.model.layers import decoder_layers
from dpo_dist.model.library_internals import (
    adapter_state,
    adapters_in_use,
    apply_liger,
    attention_function,
    attention_name,
    can_choose_attention,
    compute_beside,
    describe_slice,
    describe_whole,
    dispatched,
    expert_updates,
    first_element,
    flash_attention,
    fork_states,
    ignored_patterns,
    is_kernel,
    join_tensors,
    loading_without,
    mark_as_adapted,
    opening_files_by,
    packed_by,
    place_in_model,
    plain_attention,
    recurrent_functions,
    set_adapter_state,
    sharded_by,
    shards_loading,
    switches_adapters,
    takes_kernel,
    text_attention,
    transposed_by,
    unpack_mxfp4,
    unsharded,
    whole_mask,
    whole_shape,
    wrap_checkpointing,
)
from tests.support.families import tiny_family
from tests.support.flash_linear_attention import put_delta_kernels
from tests.support.invented_images import image_reader
from tests.support.kernels import put_kernels

IDS = torch.tensor([[3, 5, 7, 11]])


def test_nothing_is_sharded_inside_the_block_only() -> None:
    sharding = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        with unsharded():
            assert not is_deepspeed_zero3_enabled()
        assert is_deepspeed_zero3_enabled()
    finally:
        unset_hf_deepspeed_config()
        del sharding


def test_another_configuration_shards_inside_the_block_only() -> None:
    policy = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        with sharded_by({"zero_optimization": {"stage": 0}}, policy):
            assert not shards_loading()
        assert shards_loading()
    finally:
        unset_hf_deepspeed_config()
        del policy
    assert not shards_loading()


def test_transformers_transposes_by_the_shape_of_a_whole_weight() -> None:
    """By itself it takes the shape of the weight in the model, of which ZeRO-3 leaves an empty tensor."""
    model = nn.Linear(2, 3)
    shapes, model.weight.data = {"weight": model.weight.shape}, torch.empty(0)
    files, names = {"weight": torch.ones(3, 2)}, (["weight"], ["weight"])
    with transposed_by(shapes):
        kept = Transpose(check_dims=True).convert(files, *names, model=model, full_layer_name="weight")
    assert kept["weight"].shape == (3, 2)
    (turned,) = (
        Transpose(check_dims=True).convert(files, *names, model=model, full_layer_name="weight").values()
    )
    assert turned.shape == (2, 3), "transformers knows whole shapes by itself: remove transposed_by"


@pytest.mark.parametrize("bits", [4, 8])
def test_quantizers_replace_other_weights_too_inside_the_block_only(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_family("mixtral").save_pretrained(tmp_path)
    name, kinds = "model.layers.1.mlp.experts.down_proj", dict(AUTO_QUANTIZER_MAPPING)
    pack = {name: lambda weight: nn.Parameter(weight.flatten().to(torch.int8), requires_grad=False)}
    options = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    with packed_by(pack):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=options)
    assert kinds == AUTO_QUANTIZER_MAPPING
    assert (loaded.get_parameter(name).dtype, loaded.get_parameter(name).dim()) == (torch.int8, 1)
    assert loaded.get_parameter(name.replace("1", "0")).is_floating_point()
    assert not loaded.model.layers[0].self_attn.q_proj.weight.is_floating_point()


def test_transformers_opens_files_by_another_function_inside_the_block_only(tmp_path: Path) -> None:
    tiny_family("llama").save_pretrained(tmp_path)
    opened = list[str]()

    def open_file(file: str) -> Any:
        opened.append(Path(file).name)
        return safe_open(file, "pt")

    with opening_files_by(open_file):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert opened == ["model.safetensors"]
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert opened == ["model.safetensors"]


def test_mxfp4_is_unpacked_to_inputs_before_outputs() -> None:
    blocks, scales = torch.zeros(1, 2, 1, 16, dtype=torch.uint8), torch.tensor([[[127], [128]]])
    blocks[0, :, 0, 0] = 0x72  # 1 in the lower bits, 6 in the upper ones
    unpacked = unpack_mxfp4(blocks, scales.byte(), torch.bfloat16)
    assert unpacked.shape == (1, 32, 2)
    assert unpacked[0, :3].tolist() == [[1, 2], [6, 12], [0, 0]]


def test_names_in_files_become_names_in_the_model(tmp_path: Path) -> None:
    tiny_family("mixtral").save_pretrained(tmp_path)
    find_place = place_in_model(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert find_place("embed_tokens.weight") == ("model.embed_tokens.weight", None)
    former = "model.layers.0.block_sparse_moe.gate.weight"
    assert find_place(former) == ("model.layers.0.mlp.gate.weight", None)
    former = "model.layers.0.block_sparse_moe.experts.3.w3.weight"
    assert find_place(former) == ("model.layers.0.mlp.experts.gate_up_proj", ".experts.*.w3.weight")


def test_tensors_of_files_become_a_weight_as_transformers_joins_them(tmp_path: Path) -> None:
    tiny_family("mixtral").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    experts = loaded.model.layers[0].mlp.experts
    name = "model.layers.0.mlp.experts.gate_up_proj"
    gates, ups = experts.gate_up_proj.chunk(2, 1)
    parts = {".experts.*.w3.weight": [lambda: ups[2]], ".experts.*.w1.weight": [lambda: gates[2]]}
    assert torch.equal(join_tensors(loaded, name, parts), experts.gate_up_proj[2:3])
    assert join_tensors(loaded, "model.norm.weight", {None: [lambda: gates]}) is gates


def test_zero_3_leaves_weights_as_they_are_inside_the_block_only() -> None:
    model = tiny_family("mixtral")
    for part in (*model.modules(), *model.parameters()):  # as ZeRO-3 makes it
        vars(part).pop("_is_hf_initialized", None)
    names = {"model.layers.0.mlp.experts.gate_up_proj"}
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    original = modeling_utils._load_state_dict_into_zero3_model
    with loading_without(names):
        _, missing = modeling_utils._load_state_dict_into_zero3_model(model, {})
    assert modeling_utils._load_state_dict_into_zero3_model is original
    assert missing == before.keys() - names
    model._initialize_missing_keys(is_quantized=False)
    unchanged = {name for name, weight in model.named_parameters() if torch.equal(weight, before[name])}
    assert names <= unchanged
    assert "model.layers.1.mlp.experts.gate_up_proj" not in unchanged


def test_a_class_says_which_tensors_it_does_not_read() -> None:
    assert any("61" in pattern for pattern in ignored_patterns(tiny_family("deepseek_v3")))
    assert ignored_patterns(tiny_family("llama")) == ()


def test_a_model_says_how_it_attends() -> None:
    llama, own = tiny_family("llama"), tiny_family("bloom")
    llama.set_attn_implementation("eager")
    assert attention_name(llama) == "eager"
    assert attention_function(llama) is None
    assert (plain_attention(llama), plain_attention(own)) == ("sdpa", "eager")
    both = image_reader("qwen3_vl")
    both.set_attn_implementation(text_attention(both, "eager"))
    assert both.model.language_model.config._attn_implementation == "eager"
    assert both.model.visual.config._attn_implementation == "sdpa"
    assert (can_choose_attention(llama), can_choose_attention(own)) == (True, False)


def test_flash_attention_gets_separate_lengths_of_queries_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is a double, what calls it is transformers."""
    query, key = torch.randn(3, 2, 8), torch.randn(5, 2, 8)
    put_kernels(monkeypatch)
    ends = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([0, 5], dtype=torch.int32)
    attended = flash_attention(
        query, key, key, (*ends, 3, 5), softmax_scale=0.5, attn_implementation="flash_attention_2"
    )
    heads = [each.transpose(0, 1) for each in (query, key)]
    later = torch.ones(3, 5).triu(3).bool()
    scores = (heads[0] @ heads[1].transpose(1, 2) * 0.5).masked_fill(later, -torch.inf)
    torch.testing.assert_close(attended, (scores.softmax(-1) @ heads[1]).transpose(0, 1))


def test_a_checkpointed_layer_is_called_through_the_wrapper() -> None:
    model = tiny_family("llama").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls: list[object] = []

    def wrapper(checkpoint: Any, *arguments: Any) -> Any:
        calls.append(checkpoint)
        return checkpoint(*arguments)

    for layer in decoder_layers(model):
        wrap_checkpointing(layer, wrapper)
    model(IDS, use_cache=False).logits.sum().backward()
    assert len(calls) == len(decoder_layers(model)) > 0


def test_an_adapter_is_switched_without_a_change_of_what_is_trained() -> None:
    model = tiny_family("llama").eval()

    def logits() -> Tensor:
        with torch.no_grad():
            scores: Tensor = model(IDS).logits
        return scores

    base = logits()
    mark_as_adapted(model)
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), model, "own")
    assert model.active_adapters() == ["own"], "transformers asks whether the model has an adapter"
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    trained = [weight.requires_grad for weight in model.parameters()]
    assert all(map(switches_adapters, layers))
    assert [adapter_state(layer) for layer in layers] == [(["own"], False)] * len(layers)
    adapted = logits()
    assert not torch.equal(adapted, base)
    for layer in layers:
        set_adapter_state(layer, (["own"], True))
    assert torch.equal(logits(), base)
    for layer in layers:
        set_adapter_state(layer, (["own"], False))
    assert torch.equal(logits(), adapted)
    assert [weight.requires_grad for weight in model.parameters()] == trained


def test_peft_reads_the_shape_that_a_packed_weight_stands_for() -> None:
    model = tiny_family("mixtral")
    name = "model.layers.0.mlp.experts.down_proj"
    weight = model.get_parameter(name)
    shape = weight.shape
    assert whole_shape(weight) == shape
    weight.data = torch.zeros(7, 1)
    describe_whole(weight, shape)
    assert whole_shape(weight) == shape
    inject_adapter_in_model(LoraConfig(r=2, target_modules=[], target_parameters=[name]), model, "own")
    experts = model.get_submodule("model.layers.0.mlp.experts")
    assert experts.get_delta_weight("own").shape == shape


RECURRENT = {"convolve", "delta_rule", "no_fused_kernel", "scan"}


@pytest.mark.parametrize("kind", sorted(WITH_STATES))
def test_recurrent_layers_hand_the_keyword_to_functions_of_their_file(kind: str) -> None:
    """Under any name that the layers of this version call, with what the tree of states relies on."""
    causal_lm, called = tiny_family(kind), set[str]()

    class Tree:
        def __getattr__(self, name: str) -> Any:
            def call(function: Any, *inputs: Any, **options: Any) -> Any:
                called.add(name)
                return function(*inputs, **options)

            return call

    with torch.no_grad():
        assert fork_states(causal_lm)
        body = causal_lm.base_model
        plain = body(IDS, use_cache=False).last_hidden_state
        assert called == set()
        inputs = {"attention_mask": whole_mask(IDS), "packed_states": Tree(), "use_cache": False}
        with mock.patch("torch.all", side_effect=AssertionError("a GPU would be waited for")):
            assert torch.equal(body(IDS, **inputs).last_hidden_state, plain)
    assert "convolve" in called <= RECURRENT
    assert kind.startswith("lfm") or not called.isdisjoint({"delta_rule", "scan"})


OF_RECURRENT_LAYERS = re.compile(
    "causal_conv1d_fn|chunk_gated_delta_rule|mamba2_chunk_scan|chunk_kimi_delta_attention|selective_scan"
)
FILES = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
FOLDERS = sorted(file.parent for file in FILES if OF_RECURRENT_LAYERS.search(file.read_text()))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_family_with_recurrent_layers_is_known(folder: Path) -> None:
    """A new one is tried first: packed, it belongs to those with states, else to those that cannot be."""
    texts = [file.read_text() for file in folder.glob("configuration_*.py")]
    kinds = {kind for text in texts for kind in re.findall(r'^    model_type = "(\w+)"', text, re.MULTILINE)}
    assert len(kinds & (WITH_STATES | UNPACKABLE)) == 1, kinds


def rules(causal_lm: Any) -> list[tuple[Any, Any]]:
    return [functions for method, *functions in recurrent_functions(causal_lm) if method == "delta_rule"]


@pytest.mark.parametrize("kind", ["qwen3_next", "kimi_linear"])
def test_the_library_that_computes_the_delta_rule_is_known(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    causal_lm = tiny_family(kind)
    assert fork_states(causal_lm)
    ((plain, called),) = rules(causal_lm)
    assert plain.__module__ == called.__module__ == type(causal_lm).__module__
    assert not is_kernel(called)
    put_delta_kernels(monkeypatch, causal_lm)
    assert fork_states(causal_lm)
    ((rule, called),) = rules(causal_lm)
    assert rule is plain
    assert is_kernel(called)
    assert not is_kernel(rule)
    put_delta_kernels(monkeypatch, causal_lm, None)
    assert fork_states(causal_lm)
    ((_, called),) = rules(causal_lm)
    assert not is_kernel(called), "a package whose kernels cannot be imported"


def test_the_library_computes_in_16_bits_on_gpus_only() -> None:
    inputs = [
        SimpleNamespace(is_cuda=on_gpu, dtype=dtype)
        for on_gpu in (True, False)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]
    assert [takes_kernel(cast(Tensor, query)) for query in inputs] == [True, True, False, False, False, False]


@pytest.mark.parametrize("kind", ["jamba", "mamba", "qwen3", "recurrent_gemma", "zamba"])
def test_other_models_have_no_states_that_can_be_given(kind: str) -> None:
    assert not fork_states(tiny_family(kind))


def test_liger_replaces_the_layers_that_are_not_denied() -> None:
    pytest.importorskip("liger_kernel")
    model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1, vocab_size=64))
    apply_liger(model, cross_entropy=False, fused_linear_cross_entropy=False, swiglu=False)
    layer = model.model.layers[0]
    assert "liger" in layer.input_layernorm.forward.__module__
    assert "liger" not in layer.mlp.forward.__module__


def test_an_attention_function_computes_as_another_where_a_layer_gets_it() -> None:
    model = tiny_family("llama")
    own = model(IDS).logits
    name = "attention_of_a_test"
    transformers.AttentionInterface.register(name, sdpa_attention_forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)
    compute_beside(name, "other_attention_of_a_test", lambda: False)
    assert torch.equal(model(IDS).logits, own)
    calls = list[Any]()

    def other(_module: Any, query: Tensor, *_: Any, packed: Any, **__: Any) -> tuple[Tensor, None]:
        calls.append(packed)
        return torch.zeros_like(query).transpose(1, 2), None

    transformers.AttentionInterface.register("other_attention_of_a_test", other)
    layout = SimpleNamespace(is_beside=True)
    assert model(IDS, packed=layout).logits.shape == own.shape
    assert calls == [layout] * model.config.num_hidden_layers
    assert torch.equal(model(IDS, packed="of another caller").logits, own)
    compute_beside(name, "never", lambda: True)  # once for a process
    assert torch.equal(model(IDS).logits, own)


def test_the_adapters_in_use_are_those_that_peft_has_switched_on() -> None:
    model = tiny_family("llama")
    assert adapters_in_use(model) is None
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    peft_model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    assert adapters_in_use(model) == {"default"}
    peft_model.set_adapter("other")
    assert adapters_in_use(model) == {"other"}
    with peft_model.disable_adapter():
        assert adapters_in_use(model) == frozenset()


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_dispatched_experts_compute_as_their_own_forward(model_type: str) -> None:
    """In 16 bits, also where the router's weights are float32."""
    causal_lm = tiny_family(model_type).to(torch.bfloat16)
    experts = causal_lm.model.layers[0].mlp.experts
    hidden = torch.randn(5, 32, dtype=torch.bfloat16)
    chosen = torch.tensor([[0, 1], [1, 2], [3, 0], [0, 2], [2, 1]])
    weights = torch.rand(5, 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        forward = dispatched(experts, experts.forward, group, group, "cpu")
        found = forward(hidden, chosen, weights)
    finally:
        dist.destroy_process_group()
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, experts(hidden, chosen, weights))


def test_a_slice_knows_its_place_in_the_whole_weight() -> None:
    weight = nn.Parameter(torch.ones(2, 3, 5))
    assert first_element(weight) == 0
    describe_slice(weight, (8, 3, 5), 4)
    assert (first_element(weight), whole_shape(weight)) == (4 * 15, (8, 3, 5))


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_an_adapter_of_some_experts_is_a_part_of_that_of_all(model_type: str) -> None:
    names = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(tiny_family(model_type), LoraConfig(r=2, target_parameters=names))
    wrappers = [module for module in model.modules() if hasattr(module, "parameter_name")]
    assert wrappers
    for wrapper in wrappers:
        nn.init.normal_(wrapper.lora_B["default"].weight)
        whole = wrapper.get_delta_weight("default")
        torch.testing.assert_close(expert_updates(wrapper, "default", slice(1, 3)), whole[1:3])
