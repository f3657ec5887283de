"""Load a model folder as a packed model, and its tokenizer."""

import contextlib
import itertools
import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from dpo_dist.batching.costs import Arrangement
from dpo_dist.config.schema import AttentionBackend, Dtype, FusedLayers, ModelConfig, Quantization
from dpo_dist.data import ImageProcessor
from dpo_dist.foundation.errors import ConfigError, disk_error, first_line
from dpo_dist.foundation.files import content_digest, text_digest
from dpo_dist.foundation.text import pluralize, size
from dpo_dist.model.architectures import (
    SAMPLING_ROUTERS,
    SCORE,
    ImageMask,
    auto_class,
    check_causal,
    describe_reward_model,
    image_mask,
    is_reward_model,
    recorded_arrangement,
    switch_off_noise,
)
from dpo_dist.model.attention.kernels import check_kernel, choose_backend
from dpo_dist.model.attention.ulysses import TokenExchange, check_shared_tokens
from dpo_dist.model.experts import (
    ExpertShare,
    Mxfp4,
    Packing,
    choose_products,
    compute_packed,
    expert_weights,
    packings,
    set_reader,
    shares_equally,
    unpackable,
)
from dpo_dist.model.files.folder import (
    CONFIG_FILE,
    TOKENIZER_FILES,
    check_tokenizer_files,
    has_tokenizer,
    modules_on_disk,
    read_model_json,
    tokenizer_folder,
    weight_files,
)
from dpo_dist.model.files.own_experts import OwnExperts
from dpo_dist.model.files.stored import (
    RowChoice,
    mxfp4_names,
    open_plain,
    places,
    plain_config,
    plain_weights,
)
from dpo_dist.model.layers import (
    check_device,
    check_reads_images,
    checkpoint_layers,
    choose_fused,
    image_parts,
    keep_text,
    offload_inputs,
    output_layer,
    use_liger,
)
from dpo_dist.model.library_internals import (
    loading_without,
    packed_by,
    place_in_model,
    shards_loading,
    transposed_by,
    unsharded,
)
from dpo_dist.model.lora import add_adapter
from dpo_dist.model.numerics import check_precision
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.model.states import check_recurrent_kernels
from dpo_dist.model.tiled_mlp import tile_mlps, tiled_mlps

log = logging.getLogger(__name__)

TORCH_DTYPES = {Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16, Dtype.fp32: torch.float32}
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
# A kernel on the Hub (its name has a slash), for the whole model or for parts of it.
_KERNEL = re.compile(r'"\w*_implementation"\s*:\s*("[^"]*/[^"]*"|\{[^}]*/[^}]*\})')
# Patterns of tensor names, and of names for which transformers (5.23) finds the right weight under ZeRO-3: it
# would load DeepSeek-V4's final norm as the norm of compressed keys.
_RENAMED = {"deepseek_v4": {r"^model\.norm\.": r"^norm\."}}
_READ = ("fp8", "mxfp4")


def load_config(
    folder: Path, config: ModelConfig, key: str = "model.path", *, keeps_class: bool = False
) -> Any:
    """Return the transformers configuration of a model folder, with all dropout and noise switched off.

    It is that of a reward model or of a language model, as `config` says, unless it `keeps_class`.
    """
    try:
        model_config = plain_config(folder, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # a configuration's validation can raise anything
        raise _own_code_error(folder, config, key, CONFIG_FILE) or ConfigError(
            "the model's config.json cannot be read",
            where=key,
            got=f"{folder}: {first_line(error)}",
            remedy="download or save the model again, or install the transformers release that it needs",
        ) from error
    kernel = _KERNEL.search((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if kernel:
        raise ConfigError(
            "the model's config.json names code on the Hub, which is not run",
            where=key,
            got=f"{folder / CONFIG_FILE}: {' '.join(kernel[0].split())}",
            expected="an implementation of transformers",
            remedy="remove it from config.json: model.attention selects the kernel",
        )
    method = getattr(model_config, "stored_as", None)
    if method not in (None, *_READ):
        remedy = "use the original model; model.quantization=nf4 quantizes it while it is loaded"
        if method == "compressed-tensors":
            remedy = (
                f"write it once in bf16 by the lines of docs/models.md (bases in 8 or 4 bits), or {remedy}"
            )
        raise ConfigError(
            "the weight files of the model are quantized in a way that is not read",
            where=key,
            got=f"{folder}, quantized by {method}",
            expected="weights in bf16, fp16, fp32, FP8 or MXFP4",
            remedy=remedy,
        )
    switch_off_noise(model_config)
    if keeps_class:
        return model_config
    if config.gives_scores:
        describe_reward_model(model_config, key)
    elif is_reward_model(model_config.architectures):
        raise ConfigError(
            "this is a reward model: it gives scores of texts, and no log-probs",
            where=key,
            got=f"{folder}, {', '.join(model_config.architectures)}",
            expected="a causal language model",
            remedy=f"set loss=reward to train or evaluate it, or set {key} to another model",
        )
    return model_config


def _own_code_error(folder: Path, config: ModelConfig, key: str, file: str) -> ConfigError | None:
    """Return the error for a folder that needs the Python code named in `file`; None if it names none."""
    is_read = not config.trust_remote_code and (folder / file).is_file()
    classes = read_model_json(folder / file).get("auto_map") if is_read else None
    if not classes:
        return None
    return ConfigError(
        "the model folder names Python code, which is not run",
        where=key,
        got=f"{folder / file}: auto_map {classes}",
        expected="classes of transformers",
        remedy="name a model that transformers knows itself, or read the code first and then set "
        "model.trust_remote_code=true",
    )


def load_tokenizer(folder: Path, config: ModelConfig, key: str = "model.path") -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder."""
    # Without files, transformers would create an empty tokenizer of the model's class.
    check_tokenizer_files(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:
        raise _own_code_error(folder, config, key, "tokenizer_config.json") or ConfigError(
            "the model folder's tokenizer cannot be loaded",
            where=key,
            got=f"{folder}: {first_line(error)}",
            remedy="put the tokenizer's files beside config.json, and correct these files",
        ) from error
    return tokenizer


def tokenizer_digest(folder: Path, *, with_images: bool = False) -> str:
    """Return a digest of the files of a model folder that decide how text, or images, become token ids."""
    names = (*TOKENIZER_FILES, "*.py") + (_IMAGE_FILES if with_images else ())
    matches = {*itertools.chain.from_iterable(map(folder.glob, names))}
    files = sorted(filter(Path.is_file, matches))
    parts = [(str(file.relative_to(folder)), content_digest([file])) for file in files]
    config_file = folder / CONFIG_FILE  # an adapter's folder with a tokenizer has no config.json
    config = json.loads(config_file.read_bytes()) if config_file.exists() else {}
    # transformers chooses the tokenizer's class by these keys.
    parts += [(key, json.dumps(config.get(key))) for key in ("model_type", "tokenizer_class")]
    return text_digest(json.dumps(parts))


@dataclass(frozen=True)
class Encoder:
    """What makes token ids of records; `processor` is None if images are not read."""

    folder: Path  # the tokenizer's
    tokenizer: PreTrainedTokenizerBase
    processor: ImageProcessor | None

    @property
    def digest(self) -> str:
        """The digest of the tokenizer's files."""
        return tokenizer_digest(self.folder)


def load_encoder(folder: Path, adapter: Path | None, config: ModelConfig) -> Encoder:
    """Return the encoder of a model folder, with the adapter's tokenizer if it has one."""
    files = tokenizer_folder(folder, adapter)
    tokenizer = load_tokenizer(files, config)
    processor = None
    if config.images is not None:
        processor = ImageProcessor(folder, tokenizer, config.images.max_pixels)
    return Encoder(files, tokenizer, processor)


def check_same_vocabulary(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: ModelConfig,
    processor: ImageProcessor | None,
    key: str = "reference.path",
) -> None:
    """Check that the model of `key` has the policy's vocabulary, and reads images as the policy does.

    If the model's folder has no tokenizer, only the number of token ids is compared; if it has no image
    processor, that of the policy is used.
    """
    vocabulary = tokenizer.get_vocab()
    ids = load_config(folder, config, key).get_text_config().vocab_size
    other = load_tokenizer(folder, config, key).get_vocab() if has_tokenizer(folder) else vocabulary
    differing = [token for token, number in vocabulary.items() if number >= ids or other.get(token) != number]
    if differing:
        raise ConfigError(
            f"the model of {key} has other token ids than the tokenizer of model.path",
            where=key,
            got=f"{folder} with {ids} token ids: {len(differing)} of {len(vocabulary)} tokens differ, "
            f"for example {', '.join(map(repr, sorted(differing)[:3]))}",
            remedy=f"set {key} to a model with the tokenizer of model.path",
        )
    if config.images is None or processor is None or not any(folder.glob("*processor_config.json")):
        return
    other_processor = ImageProcessor(folder, tokenizer, config.images.max_pixels)
    if other_processor.settings != processor.settings:
        raise ConfigError(
            f"the model of {key} reads images in another way than that of model.path",
            where=f"{key}, model.images",
            got=f"{folder}, whose image processor has other settings",
            expected="equal files preprocessor_config.json and processor_config.json",
            remedy=f"set {key} to a model with the image processor of model.path, or copy that one's files",
        )


def load_packed(
    folder: Path,
    config: ModelConfig,
    max_length: int,
    device: torch.device,
    key: str = "model.path",
    sequence: TokenExchange | None = None,
    share: ExpertShare | None = None,
    seed: int | None = None,
) -> PackedCausalLM:
    """Return the model of `folder` with the chunked head, in the arrangement recorded for its architecture.

    `exactness.StartCheck` checks that this arrangement is exact. Under a ZeRO-3 loading context every process
    keeps only its shard. Dropout is off: policy and reference compute the same function (law L7).

    `max_length` is the longest prompt plus response in tokens, `sequence` the ranks that share the tokens of
    each batch. Only this process's `share` of the experts is read: quantized ones are packed, those that
    ZeRO-3 shards have a reader (`own_reader`) in place of values. A reward model's output layer is drawn by
    `seed` if the folder has none. Errors name `key`.
    """
    backend = choose_backend(config.attention, config.dtype, device)
    model_config = load_config(folder, config, key)
    check_causal(model_config, key)
    text = model_config.get_text_config()
    if sequence is not None:
        check_shared_tokens(model_config, sequence.ranks)
    reads = config.images is not None
    mask = image_mask(model_config) if reads else ImageMask.causal
    check_kernel(backend, device, text, TORCH_DTYPES[config.dtype], mask)
    check_device(config, text, device)
    causal_lm = load_weights(folder, model_config, config, device, key=key, share=share, seed=seed)
    choose_products(causal_lm, device, TORCH_DTYPES[config.dtype])
    fused = choose_fused(config, text, device)
    if fused is FusedLayers.liger:
        use_liger(causal_lm)
    checkpoint_layers(causal_lm, config.gradient_checkpointing)
    if config.activation_offload:
        offload_inputs(causal_lm)
    if config.tiled_mlp:
        tile_mlps(causal_lm)
    model = PackedCausalLM(causal_lm, backend, fused, sequence, Arrangement.padded, reads_images=reads)
    if model.forks_states:
        check_recurrent_kernels(causal_lm, device, TORCH_DTYPES[config.dtype])
    model.arrange_as_recorded(recorded_arrangement(text.model_type), max_length)
    return model


def without_weights(
    model_config: Any, config: ModelConfig, start: Path | None = None, *, keeps_others: bool = False
) -> Any:
    """Return the policy's transformers model on the meta device, with its adapter.

    So options that name layers and modules are checked before weights are read. `keeps_others` keeps the
    parts that text does not use, frozen.
    """
    kind = auto_class(model_config, config.trust_remote_code)
    try:
        with torch.device("meta"):
            causal_lm = kind.from_config(
                model_config, dtype=TORCH_DTYPES[config.dtype], trust_remote_code=config.trust_remote_code
            )
            causal_lm.tie_weights()  # as from_pretrained does: a model's code may untie weights
    except Exception as error:  # an architecture's constructor can raise anything
        raise _no_text_model(model_config, first_line(error)) from error
    is_other = model_config.is_encoder_decoder or output_layer(causal_lm) is None
    if kind is not AutoModelForCausalLM and is_other:
        raise _no_text_model(model_config, f"{type(causal_lm).__name__} has no decoder with an output layer")
    if config.images is not None:
        check_reads_images(causal_lm, "model.path")
    keep_text(causal_lm, config.images, drops=not keeps_others)
    checkpoint_layers(causal_lm, config.gradient_checkpointing)
    if config.tiled_mlp and not tiled_mlps(causal_lm):
        raise ConfigError(
            "no layer has an MLP that tiles of tokens can compute",
            where="model.tiled_mlp",
            got=f"{model_config.model_type}: experts, layers that share weights, or layers without an MLP",
            remedy="set model.tiled_mlp=false",
        )
    if config.adapter is not None:
        with torch.device("meta"):
            packed = PackedCausalLM(causal_lm, AttentionBackend.sdpa, arrangement=Arrangement.padded)
            add_adapter(packed, config, 0, start)
    return causal_lm


def _no_text_model(model_config: Any, reason: str) -> ConfigError:
    return ConfigError(
        "this is no model that continues text, or its config.json is wrong",
        where="model.path",
        got=f"{model_config.model_type}: {reason}",
        expected="a causal language model, or a model of images and text with one text decoder",
        remedy="choose such a model; if it is one, compare config.json with the original's",
    )


def load_weights(
    folder: Path,
    model_config: Any,
    config: ModelConfig,
    device: torch.device,
    *,
    key: str = "model.path",
    kind: Any = None,
    share: ExpertShare | None = None,
    seed: int | None = None,
) -> Any:
    """Return the model of `folder` with every weight read from its files, none left at random values.

    A reward model's output layer is drawn by `seed` if the files have none.

    By default a language model is loaded, without the parts that text does not use, but with those for images
    if `config` has `images`; `kind` is another class.
    """
    check_precision(config.dtype, device)
    drawn = {} if seed is None else drawn_score(folder, model_config, seed)
    described = check_contents(folder, model_config, config, key=key, kind=kind, drawn=drawn)
    shapes = {name: weight.shape for name, weight in described.named_parameters(remove_duplicate=False)}
    is_sharded = shards_loading() and config.quantization is None
    options = placement(config, device)
    packed = dict[str, Packing | Mxfp4]()
    if config.quantization is not None:
        packed = packings(described, config.quantization, TORCH_DTYPES[config.dtype], mxfp4_names(folder))
        if config.images is not None or config.gives_scores:
            # Parts for images and the output layer keep their precision.
            head = output_layer(described)
            whole = [*image_parts(described), *(n for n, one in described.named_modules() if one is head)]
            options["quantization_config"].llm_int8_skip_modules = whole
    kept = [name for name, packing in packed.items() if isinstance(packing, Mxfp4)]
    rows = dict[str, RowChoice]()
    readers = dict[str, Callable[[], torch.Tensor]]()
    if share is not None and shares_equally(described, share.ranks):
        names = expert_weights(described) & (shapes if is_sharded else packed).keys()
        open_file = open_plain(folder, TORCH_DTYPES[config.dtype], kept)
        own = OwnExperts(described, folder, open_file, names, share)
        if is_sharded:  # rank 0 would read all experts
            rows = dict.fromkeys(own.rows)
            readers = {name: partial(_read, own, name, folder, key) for name in own.shapes}
        else:
            rows = own.rows
            shapes |= own.shapes
    pack = {name: packing.pack for name, packing in packed.items()}
    with _loading_errors(folder, key), transposed_by(shapes), packed_by(pack), loading_without(readers):
        causal_lm, report = _load(folder, model_config, config, kind, kept, rows, drawn, **options)
    for name, read in readers.items():
        set_reader(causal_lm.get_parameter(name), read)
    # Under ZeRO-3, transformers maps names in files in another way, which may miss weights.
    unsharded_instead = "; or set parallelism.kind=zero2 or ddp"
    _check_missing(report, folder, key, unsharded_instead if is_sharded else "")
    if not is_sharded and config.quantization is None:
        _freeze_as_defined(causal_lm)
    unpacked = [] if config.quantization is None else unpackable(described)
    if unpacked:
        memory = size(TORCH_DTYPES[config.dtype].itemsize * sum(map(torch.numel, unpacked)))
        log.warning("%s: %s leaves experts in %s, %s", folder, config.quantization, config.dtype, memory)
    compute_packed(causal_lm, packed)
    if kind is None:
        if config.images is not None:
            check_reads_images(causal_lm, key)
        keep_text(causal_lm, config.images)
    for module in causal_lm.modules():
        # `padding_idx` stops the padding token's gradient, but that token may also end texts. Tables of
        # positions need the index.
        if isinstance(module, nn.Embedding) and "Position" not in type(module).__name__:
            module.padding_idx = None
        # Otherwise bitsandbytes repacks 4-bit weights for CPUs in evaluation: these pass no gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            _check_nf4(module.weight, folder, key)
    _keep_evaluating(causal_lm)
    if causal_lm.config.model_type != model_config.model_type:
        log.warning("%s: only its text model is loaded (%s)", folder, type(causal_lm).__name__)
    return causal_lm


def _read(own: OwnExperts, name: str, folder: Path, key: str) -> torch.Tensor:
    with _loading_errors(folder, key):
        return own.read(name)


def _check_nf4(weight: Any, folder: Path, key: str) -> None:
    """Check that a linear layer's weight in 4 bits is unpacked block by block.

    On CPUs bitsandbytes (0.50) unpacks some rows wrongly that are no multiple of a block, such as 96 numbers.
    """
    from bitsandbytes.functional import dequantize_4bit  # noqa: PLC0415  (optional extra)

    flat = copy(weight.quant_state)
    if weight.device.type != "cpu" or flat.shape[-1] % flat.blocksize == 0:
        return
    flat.shape = torch.Size([flat.shape.numel()])
    rows, numbers = (dequantize_4bit(weight.data, state) for state in (weight.quant_state, flat))
    if not torch.equal(rows.flatten(), numbers.flatten()):
        setting = "reference.quantization" if key == "reference.path" else "model.quantization"
        raise ConfigError(
            "bitsandbytes reads this model's weights in 4 bits wrongly on a CPU",
            where=key,
            got=f"{folder}: a layer of {rows.shape[-1]} inputs",
            expected=f"a multiple of {flat.blocksize} inputs, or a GPU",
            remedy=f"train on a GPU, or set {setting}=int8 or null",
        )


def drawn_score(folder: Path, model_config: Any, seed: int) -> dict[str, torch.Tensor]:
    """Return the output layer of a reward model that starts from a causal model in `folder`, by its name.

    It is drawn as transformers does, on the host: the same for every device, world and kind of parallelism.
    Empty if the model is none of scores, or the folder is that of a reward model: its layer must be there.
    """
    name = f"{SCORE}.weight"
    described: Any = read_model_json(folder / CONFIG_FILE)
    had_scores = is_reward_model(described.get("architectures"))
    if not is_reward_model(model_config.architectures) or had_scores or name in places(folder):
        return {}
    text = model_config.get_text_config()
    std = getattr(text, "initializer_range", 0.02)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.empty(1, text.hidden_size).normal_(0.0, std, generator=generator)}


def check_has_score(base: Path, adapter: Path, key: str) -> None:
    """Check that an adapter, or its base, has a reward model's output layer, which else would be drawn."""
    _, in_full = modules_on_disk(adapter)
    if SCORE not in in_full and f"{SCORE}.weight" not in places(base):
        raise ConfigError(
            "neither the adapter nor its base has the output layer of a reward model",
            where=key,
            got=f"{adapter} on {base}",
            expected=f"weights of {SCORE}",
            remedy="name an adapter that was trained with loss=reward, or merge this one into its base and "
            "set model.path to the result",
        )


def check_contents(
    folder: Path,
    model_config: Any,
    config: ModelConfig,
    *,
    key: str = "model.path",
    kind: Any = None,
    drawn: Mapping[str, torch.Tensor] | None = None,
) -> Any:
    """Check that a folder has the weights that its config.json describes; return its model without weights.

    `drawn` are weights beside those of the folder.

    Only tensors that config.json ties are read: if two tied tensors differ, ZeRO-3 and peft would load
    another model than other programs.
    """
    with _loading_errors(folder, key):
        with unsharded(), _no_progress():  # under ZeRO-3 the report misses mistakes
            shapes: dict[str, Any] = {"device_map": "meta", "ignore_mismatched_sizes": True}
            causal_lm, report = _load(folder, model_config, config, kind, drawn=drawn, **shapes)
        differing = _differing_ties(causal_lm, folder, TORCH_DTYPES[config.dtype])
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, *sizes = mismatched[0]
        in_files, described = (" x ".join(map(str, size)) for size in sizes)
        wrong = [ours for theirs, ours in zip(*sizes, strict=False) if ours != theirs]
        values = vars(model_config.get_text_config()).items()
        numbers = ((option, value) for option, value in values if not isinstance(value, bool))
        options = [option for option, value in numbers if value in wrong]
        raise ConfigError(
            "the weight files have other sizes than config.json says",
            where=key,
            got=f"{folder}: {name}: {in_files} in the files, {described} by config.json"
            f" ({pluralize(len(mismatched), 'such tensor')})",
            remedy=f"correct config.json ({' or '.join(options) or 'the sizes of layers and heads'}), or use "
            "the weight files that belong to it",
        )
    _check_missing(report, folder, key)
    check_all_weights_read(causal_lm, sorted(report["unexpected_keys"]), folder, key)
    if differing:
        one, other = differing
        part = "" if causal_lm.config.model_type == model_config.model_type else " (in its text_config)"
        raise ConfigError(
            "config.json ties two weights, but the weight files have a different tensor for each",
            where=key,
            got=f"{folder}: {one} and {other}, with tie_word_embeddings true",
            expected="one tensor, or two equal tensors",
            remedy=f"set tie_word_embeddings to false in config.json{part}, so that both are used; or remove "
            f"{one} from the weight files",
        )
    return causal_lm


def _check_missing(report: dict[str, Any], folder: Path, key: str, also: str = "") -> None:
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(
            "the model folder lacks weights, which would be initialized to random values",
            where=key,
            got=f"{folder} without {', '.join(missing[:5])} ({len(missing)} in all)",
            remedy=f"set {key} to a complete model folder" + also,
        )


def check_contents_at_hand(folder: Path, config: ModelConfig, key: str = "model.path") -> None:
    """Run `check_contents` if the weight files are local; a description from the hub comes without them."""
    files = weight_files(folder)
    if files and all(file.is_file() for file in files):
        model_config = load_config(folder, config, key)
        drawn = drawn_score(folder, model_config, seed=0)
        check_contents(folder, model_config, config, key=key, drawn=drawn)


def _load(
    folder: Path,
    model_config: Any,
    config: ModelConfig,
    kind: Any,
    kept: Collection[str] = (),
    rows: Mapping[str, RowChoice] | None = None,
    drawn: Mapping[str, torch.Tensor] | None = None,
    **options: Any,
) -> Any:
    """Return the model that `from_pretrained` loads, and its loading report.

    `kept`, `rows` and `drawn` are those of `plain_weights`.
    """
    dtype = TORCH_DTYPES[config.dtype]
    is_read = options.get("device_map") != "meta"
    with plain_weights(folder, dtype, kept, rows, drawn, is_read=is_read):
        return (kind or auto_class(model_config, config.trust_remote_code)).from_pretrained(
            folder,
            config=model_config,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            use_safetensors=True,
            key_mapping=_RENAMED.get(model_config.model_type),
            **options,
        )


@contextlib.contextmanager
def _loading_errors(folder: Path, key: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # an architecture's constructor can raise anything
        full_disk = disk_error(error) if getattr(error, "filename", None) is None else None
        if full_disk:  # loading writes its progress to the log file
            raise full_disk from error
        raise ConfigError(
            "the model cannot be loaded",
            where=key,
            got=f"{folder}: {first_line(error)}",
            remedy=f"download or save the model again, or set {key} to another model",
        ) from error


@contextlib.contextmanager
def _no_progress() -> Iterator[None]:
    had_progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_progress:
            transformers_logging.enable_progress_bar()


def _differing_ties(causal_lm: Any, folder: Path, dtype: torch.dtype) -> tuple[str, str] | None:
    """Return the names, in the weight files, of two tied weights that differ; None if no tied weights do.

    `causal_lm` is on the meta device and has a weight for each tensor of the files, also for tied ones.
    """
    weight = causal_lm.get_parameter_or_buffer
    ties = causal_lm.all_tied_weights_keys
    apart = [(one, other) for one, other in ties.items() if weight(one) is not weight(other)]
    if not apart:
        return None
    find_place = place_in_model(causal_lm)
    stored_as = {find_place(name)[0]: (file, name) for name, file in places(folder).items()}

    def value(name: str) -> torch.Tensor:
        file, stored = stored_as[name]
        with safe_open(file, "pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(stored)
            return tensor.to(dtype)

    differing = (pair for pair in apart if not torch.equal(*map(value, pair)))
    return next(((stored_as[one][1], stored_as[other][1]) for one, other in differing), None)


def placement(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """Return arguments of `from_pretrained` that quantize weights, or load unsharded ones on a GPU."""
    if config.quantization is not None:
        nf4 = config.quantization is Quantization.nf4
        quantized = BitsAndBytesConfig(
            load_in_8bit=not nf4,
            load_in_4bit=nf4,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=TORCH_DTYPES[config.dtype],
        )
        return {"quantization_config": quantized, "device_map": {"": device}}
    on_host = device.type == "cpu" or shards_loading()  # ZeRO-3 moves its shards itself
    return {} if on_host else {"device_map": {"": device}}


def _keep_evaluating(causal_lm: Any) -> None:
    """Keep routers that sample experts in training in evaluation mode, also when the model trains."""
    router, _ = SAMPLING_ROUTERS.get(causal_lm.config.get_text_config().model_type, ("", ""))
    for name, module in causal_lm.named_modules():
        if router and name.endswith(f".{router}"):
            module.eval()
            module.train = lambda _mode=True, module=module: module


def _freeze_as_defined(causal_lm: Any) -> None:
    """Freeze the weights that an architecture does not train, such as the biases of ERNIE's routers.

    transformers makes every weight that it reads trainable, except under ZeRO-3.
    """
    with torch.device("meta"):
        defined = type(causal_lm)(causal_lm.config)
    for name, weight in defined.named_parameters():
        if not weight.requires_grad:
            causal_lm.get_parameter(name).requires_grad_(False)


def check_all_weights_read(causal_lm: Any, unread: list[str], folder: Path, key: str = "model.path") -> None:
    """Check that the architecture reads all tensors that the files contain for its modules.

    Tensors of modules that the model does not have (a value head, layers that predict further tokens) are
    only logged: log-probs do not depend on them. Layers beyond config.json's number of layers are an error.
    """
    modules = dict(causal_lm.named_modules())
    # Layers that predict further tokens follow the others in the same list (DeepSeek-V3, GLM-4.5).
    predicts_more = bool(getattr(causal_lm.config.get_text_config(), "num_nextn_predict_layers", None))
    foreign: list[str] = []
    missed: list[str] = []
    for name in unread:
        parts = name.split(".")
        depth = next(n for n in range(len(parts), -1, -1) if ".".join(parts[:n]) in modules)
        owner = ".".join(parts[:depth])
        is_layer = isinstance(modules[owner], nn.ModuleList) and parts[depth].isdecimal()
        is_foreign = predicts_more if is_layer else owner in ("", causal_lm.base_model_prefix)
        if is_foreign:
            foreign.append(name)
        else:
            missed.append(name)
    if missed:
        raise ConfigError(
            f"the weight files have tensors that {type(causal_lm).__name__} does not read",
            where=key,
            got=f"{folder} with {', '.join(missed[:5])} ({len(missed)} in all)",
            expected="weights and config.json of one architecture",
            remedy="check model_type and the options in config.json, such as num_hidden_layers",
        )
    if foreign:
        names = ", ".join(foreign[:5])
        kind = type(causal_lm).__name__
        log.warning("%s: not used by %s: %s (%d tensors in all)", folder, kind, names, len(foreign))
