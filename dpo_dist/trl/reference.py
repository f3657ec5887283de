"""The reference's log-probs in TRL's trainers: each once, kept in the store of our own runs.

A reference in memory is named by the digest of its weights and configuration. At each call a sum over the
bits of its weights says whether they are as they were; once they are not, the reference is asked live.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from dpo_dist.distributed.deepspeed_internals import is_sharded, shard_of
from dpo_dist.foundation.errors import ReferenceModelError, in_one_line
from dpo_dist.foundation.files import text_digest
from dpo_dist.model.architectures import UNPACKABLE, WITH_STATES
from dpo_dist.model.attention.kernels import choose_backend
from dpo_dist.model.flops import visited_experts
from dpo_dist.model.numerics import numerics_profile
from dpo_dist.reference.fill import ENTRIES_PER_SHARD
from dpo_dist.reference.store import LogpStore, ReferenceFingerprint, StoredLogps

_DTYPES = {torch.float32: Dtype.fp32, torch.float16: Dtype.fp16, torch.bfloat16: Dtype.bf16}
# Of a configuration, what does not change a log-prob, and what TRL sets.
_NO_SHAPE = ("pad_token_id", "use_cache", "transformers_version", "architectures", "dtype", "_name_or_path")
# The packages of layers that compute as transformers does.
_WITHOUT_KERNELS = {"accelerate", "dpo_dist", "peft", "torch", "transformers", "trl"}


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
        self._digest = ""
        self._is_live = False
        self._fingerprint: ReferenceFingerprint | None = None
        self._store: LogpStore | None = None
        self._waiting: dict[bytes, StoredLogps] = {}
        """By key what the store has not yet."""
        self._is_sharded = False

    def may_keep(self, model: PreTrainedModel) -> bool:
        """Return whether the model is as it was when it was first asked. Collective where it is sharded."""
        if self._is_live:
            return False
        weights = [weight for name, weight in model.named_parameters() if not self._is_other(name)]
        self._is_sharded = any(is_sharded(weight) or isinstance(weight, DTensor) for weight in weights)
        sums, fault = _bit_sums(weights), ""
        if not self._sums:
            self._sums, digest = sums, self._digest_of(model)
            self._digest = text_digest(json.dumps(gathered(digest))) if self._is_sharded else digest
        if sums != self._sums:
            fault = "its weights have changed"
        elif (fingerprint := self._fingerprint_of(model)) != self._fingerprint:
            self.flush()
            self._fingerprint = fingerprint
            fault = self._open()
        faults = gathered(fault) if self._is_sharded else [fault]
        if fault := next(filter(None, faults), ""):
            self._stop(fault)
        return not self._is_live

    def _stop(self, fault: str) -> None:
        self._is_live = True
        self._say(f"the reference's log-probs are computed in each step from now on, and not kept: {fault}")

    def _open(self) -> str:
        """Open the store; return why it cannot be used, or nothing."""
        assert self._fingerprint is not None
        try:
            self._store = LogpStore.open(self._root, self._fingerprint)
            self._store.check_writable()
        except ReferenceModelError as error:
            return in_one_line(error)
        return ""

    def find(self, keys: Keys) -> list[StoredLogps] | None:
        """Return the log-probs of each key; None if one is missing, on any rank that shares the model."""
        assert self._store is not None, "`may_keep` comes first"
        entries = [self._waiting.get(key.tobytes()) for key in keys]
        if any(entry is None for entry in entries):
            entries = self._store.find(keys)
        whole = [entry for entry in entries if entry is not None]
        is_whole = len(whole) == len(keys)
        return whole if (all(gathered(is_whole)) if self._is_sharded else is_whole) else None

    def keep(self, keys: Keys, entries: Sequence[StoredLogps]) -> None:
        """Keep log-probs; those that are not finite are not worth it."""
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

    def _digest_of(self, model: PreTrainedModel) -> str:
        """Return the digest of this rank's weights, and of the configuration."""
        # With what a quantized weight has beside its codes.
        state = model.state_dict(keep_vars=True).items()
        named = [(_own_name(name), value) for name, value in state if not self._is_other(name)]
        config = model.config.get_text_config().to_dict()
        shape = {name: str(value) for name, value in config.items() if name not in _NO_SHAPE}
        tensors = sorted((entry for entry in named if isinstance(entry[1], Tensor)), key=itemgetter(0))
        with ThreadPoolExecutor(8) as pool:
            digests = pool.map(lambda entry: (entry[0], *_tensor_digest(entry[1])), tensors)
            return text_digest(json.dumps([sorted(shape.items()), *digests]))

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
        places = {module.forward.__module__.split(".")[0] for module in model.modules()}
        if kernels := sorted(places - _WITHOUT_KERNELS):
            profile["layers"] = ", ".join(kernels)
        return ReferenceFingerprint(self._digest, profile, self._label)


def _own_name(name: str) -> str:
    """Return a weight's name in the model without an adapter."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _local(weight: Tensor) -> Tensor:
    """Return this rank's part of a weight."""
    if is_sharded(weight) and (shard := shard_of(weight)) is not None:
        return shard.detach()
    local: Tensor = weight.detach()
    return local.to_local() if isinstance(local, DTensor) else local


def _bit_sums(weights: Sequence[Tensor]) -> list[int]:
    """Return the sum of the bits of each weight, read as integers."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    local = [_local(weight).reshape(-1) for weight in weights]
    sums = [part.view(integers[part.element_size()]).sum(dtype=torch.int64) for part in local]
    return torch.stack([part.to(sums[0].device) for part in sums]).tolist()


def _tensor_digest(weight: Tensor) -> tuple[str, str]:
    local = _local(weight)
    content: Any = local.reshape(-1).cpu().view(torch.uint8).numpy()
    return f"{local.dtype} {tuple(local.shape)}", hashlib.blake2b(content, digest_size=16).hexdigest()
