"""The reference's log-probs in TRL's trainers: each once, kept in the store of our own runs.

A reference in memory is named by the digest of its weights and configuration. At each call sums over the
bits of its weights say whether they are as they were; once they are not, the reference is asked live.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Number
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dpo_dist.batching.content_keys import Keys
from dpo_dist.config.schema import AttentionBackend, Dtype, FusedLayers, ModelConfig
from dpo_dist.distributed.deepspeed_internals import OWN_ATTRIBUTES, is_sharded, shard_of
from dpo_dist.foundation.errors import ReferenceModelError, in_one_line
from dpo_dist.foundation.files import text_digest
from dpo_dist.model.architectures import UNPACKABLE, WITH_STATES
from dpo_dist.model.attention.kernels import choose_backend
from dpo_dist.model.flops import visited_experts
from dpo_dist.model.library_internals import switches_adapters
from dpo_dist.model.numerics import numerics_profile
from dpo_dist.reference.fill import ENTRIES_PER_SHARD
from dpo_dist.reference.store import LogpStore, ReferenceFingerprint, StoredLogps
from dpo_dist.trl.others_code import others_hooks, others_layers, packages_of

_DTYPES = {torch.float32: Dtype.fp32, torch.float16: Dtype.fp16, torch.bfloat16: Dtype.bf16}
# Of a configuration, what does not change a log-prob, and what TRL sets.
_NO_SHAPE = ("pad_token_id", "use_cache", "transformers_version", "architectures", "dtype", "_name_or_path")
# Of an adapter's, where it comes from and what it is for.
_NO_ADAPTER = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")
_NO_NUMBER = ("training", "gradient_checkpointing")
"""Numbers on layers that change no log-prob without noise."""


def gathered(value: Any) -> list[Any]:
    """Return the values of all ranks; collective."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


class KeptReference:
    """The log-probs of one reference by its response's key: from the store, or kept for it until `flush`.

    `other_adapters`: the names of the adapters that are not part of the reference. `say`: prints a line once.
    """

    def __init__(
        self, root: Path, label: str, other_adapters: frozenset[str], say: Callable[[str], None]
    ) -> None:
        self._root, self._label, self._other, self._say = root, label, other_adapters, say
        self._sums: list[int] = []
        self._numbers: list[tuple[str, Any]] = []
        self._digest = ""
        self._is_live = False
        self.is_compared = False
        """Whether log-probs of the store were compared with those that the reference computes."""
        self._fingerprint: ReferenceFingerprint | None = None
        self._store: LogpStore | None = None
        self._waiting: dict[bytes, StoredLogps] = {}
        """By key what the store has not yet."""

    def find(self, model: PreTrainedModel, keys: Keys) -> list[StoredLogps] | None:
        """Return the log-probs of each key; None if they have to be computed. Collective.

        All ranks compute if one has to, also where each has the whole model: each rank may see another store.
        """
        if self._is_live:
            return None
        fault = self._fault(model)
        entries = [] if fault else self._stored(keys)
        ranks = gathered((fault, entries is not None))
        if fault := next((of_rank for of_rank, _ in ranks if of_rank), ""):
            self._stop(fault)
        return entries if not fault and all(is_whole for _, is_whole in ranks) else None

    def note_comparison(self, fault: str) -> None:
        """Note how entries differ from what the reference computes; empty if rounding explains it."""
        self.is_compared = True
        if fault:
            self._waiting = {}  # they would stand among entries of another reference
            self._stop(f"what the store has is not of this reference: {fault}")

    def _stop(self, fault: str) -> None:
        self._is_live = True
        self._say(f"the reference's log-probs are computed in each step from now on, and not kept: {fault}")

    def _fault(self, model: PreTrainedModel) -> str:
        """Return why log-probs of the model cannot be kept, or nothing; open the store of its numerics."""
        hooks = others_hooks(model)
        others = sorted({*others_layers(model), *hooks})
        if strange := [package for package in others if not packages_of(package)]:
            return f"its layers call {', '.join(strange)}, which is no package with a version"
        if hooks:
            return f"its layers have hooks of {', '.join(hooks)}"
        tensors = [*model.named_parameters(), *model.named_buffers()]
        own = [tensor for name, tensor in tensors if not self._is_other(name)]
        sums, numbers = _checksums(own), self._numbers_of(model)
        if not self._sums:
            self._sums, self._numbers, self._digest = sums, numbers, self._digest_of(model, numbers)
            if any(is_sharded(tensor) or isinstance(tensor, DTensor) for tensor in own):
                self._digest = text_digest(json.dumps(gathered(self._digest)))
        if sums != self._sums:
            return "its weights have changed"
        if numbers != self._numbers:
            return "numbers on its layers have changed"
        fingerprint = self._fingerprint_of(model)
        if fingerprint == self._fingerprint:
            return ""
        self.flush()
        self._fingerprint = fingerprint
        return self._open()

    def _open(self) -> str:
        """Open the store; return why it cannot be used, or nothing."""
        assert self._fingerprint is not None
        try:
            self._store = LogpStore.open(self._root, self._fingerprint)
        except ReferenceModelError as error:
            return in_one_line(error)
        return ""

    def _stored(self, keys: Keys) -> list[StoredLogps] | None:
        """Return the log-probs of each key; None if one is missing."""
        assert self._store is not None, "`_fault` opens it"
        entries = [self._waiting.get(key.tobytes()) for key in keys]
        if any(entry is None for entry in entries):
            entries = self._store.find(keys)
        whole = [entry for entry in entries if entry is not None]
        return whole if len(whole) == len(keys) else None

    def keep(self, keys: Keys, entries: Sequence[StoredLogps]) -> None:
        """Keep log-probs; those that are not finite are not worth it."""
        if self._is_live:
            return
        for key, entry in zip(keys, entries, strict=True):
            if np.isfinite(entry).all():
                self._waiting[key.tobytes()] = entry
        if len(self._waiting) >= ENTRIES_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        """Write what waits as one shard."""
        if self._store is None or not self._waiting:
            return
        keys = np.frombuffer(b"".join(self._waiting), dtype=np.uint64).reshape(-1, 2)
        is_new = ~self._store.contains(keys)
        entries = [entry for entry, new in zip(self._waiting.values(), is_new, strict=True) if new]
        self._waiting = {}
        try:
            if entries:
                self._store.write(keys[is_new], entries)
        except ReferenceModelError as error:  # training does not need them
            self._say(in_one_line(error))
        self._open()

    def _is_other(self, name: str) -> bool:
        return not self._other.isdisjoint(name.split("."))

    def _adapters_of(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return the configurations of the reference's own adapters by name."""
        adapters = getattr(model, "peft_config", {})
        return {name: config for name, config in adapters.items() if name not in self._other}

    def _numbers_of(self, model: PreTrainedModel) -> list[tuple[str, str]]:
        """Return the numbers that layers have beside weights, by name: scalings, what a script may set.

        A layer with adapters computes as the layer inside if these are off, whatever numbers it has.
        """
        adapters = self._adapters_of(model)
        found = list[tuple[str, str]]()
        for path, layer in model.named_modules():
            if self._is_other(path):
                continue
            values = vars(layer)
            if switches_adapters(layer):
                by_adapter = {name: value for name, value in values.items() if isinstance(value, dict)}
                values = {name: [of.get(key) for key in adapters] for name, of in by_adapter.items()}
            for name, value in values.items():
                if not name.startswith(("_", *OWN_ATTRIBUTES)) and name not in _NO_NUMBER:
                    found += [(_own_name(f"{path}.{name}"), repr(number)) for number in _numbers_in(value)]
        return sorted(found)

    def _digest_of(self, model: PreTrainedModel, numbers: Any) -> str:
        """Return the digest of this rank's weights, of the numbers on layers, and of configurations."""
        # With what a quantized weight has beside its codes.
        state = {**dict(model.named_buffers()), **model.state_dict(keep_vars=True)}
        named = [(_own_name(name), value) for name, value in state.items() if not self._is_other(name)]
        config = model.config.get_text_config().to_dict()
        shape = {name: str(value) for name, value in config.items() if name not in _NO_SHAPE}
        adapters = {
            name: {key: str(value) for key, value in config.to_dict().items() if key not in _NO_ADAPTER}
            for name, config in self._adapters_of(model).items()
        }
        tensors = sorted((entry for entry in named if isinstance(entry[1], Tensor)), key=itemgetter(0))
        with ThreadPoolExecutor(8) as pool:
            digests = pool.map(lambda entry: (entry[0], *_tensor_digest(entry[1])), tensors)
            return text_digest(json.dumps([sorted(shape.items()), adapters, numbers, *digests]))

    def _fingerprint_of(self, model: PreTrainedModel) -> ReferenceFingerprint:
        """Return the reference's identity with the numerics of this call."""
        device, text = model.device, model.config.get_text_config()
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        dtype = _DTYPES.get(model.dtype, Dtype.bf16)
        profile = numerics_profile(
            ModelConfig(dtype=dtype),
            choose_backend(AttentionBackend.auto, Dtype.bf16 if autocast else dtype, device),
            FusedLayers.none,
            device,
            recurrent=text.model_type in WITH_STATES | UNPACKABLE,
            has_experts=visited_experts(text) > 0,
        )
        # TRL's head rounds otherwise than ours: digits of both must not meet in one difference.
        profile["head"] = f"trl {trl.__version__}"
        if autocast is not None:
            profile["autocast"] = str(autocast)
        if hasattr(model, "quantization_method"):
            profile["quantization"] = str(model.quantization_method)
        if kernels := others_layers(model):
            profile["layers"] = ", ".join(map(packages_of, kernels))
        return ReferenceFingerprint(self._digest, profile, self._label)


def _numbers_in(value: Any) -> list[Any]:
    """Return the numbers of a plain value, of a list or of a dict."""
    if isinstance(value, Number):
        return [value]
    if type(value) is Tensor:
        return [value.item()] if value.numel() == 1 else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [number for part in parts for number in _numbers_in(part)]


def _own_name(name: str) -> str:
    """Return a weight's name in the model without an adapter."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _local(weight: Tensor) -> Tensor:
    """Return this rank's part of a weight."""
    if is_sharded(weight) and (shard := shard_of(weight)) is not None:
        return shard.detach()
    local: Tensor = weight.detach()
    return local.to_local() if isinstance(local, DTensor) else local


def _checksums(tensors: Sequence[Tensor]) -> list[int]:
    """Return sums over the bits of each tensor, in which each place has another factor."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = list[Tensor]()
    factors = dict[torch.device, Tensor]()
    for tensor in tensors:
        local = _local(tensor)
        if local.device not in factors:
            # On a CPU a part that stays in its cache: 39 ms in place of 288 for 42M weights.
            size = 1 << (15 if local.device.type == "cpu" else 24)
            factors[local.device] = 0x9E3779B1 * torch.arange(1, size + 1, device=local.device) % (1 << 31)
        of_places = factors[local.device]
        bits = local.reshape(-1).view(integers[local.element_size()])
        for part in torch.split(bits, len(of_places)):
            sums.append((part * of_places[: len(part)]).sum())
    return torch.stack([part.to(sums[0].device) for part in sums]).tolist()


def _tensor_digest(weight: Tensor) -> tuple[str, str]:
    local = _local(weight)
    content: Any = local.reshape(-1).cpu().view(torch.uint8).numpy()
    return f"{local.dtype} {tuple(local.shape)}", hashlib.blake2b(content, digest_size=16).hexdigest()
