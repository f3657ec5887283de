"""The files of any model or adapter that scores pairs or responds: found, named by a digest, and loaded."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dpo_dist.config.schema import FusedLayers, ModelConfig
from dpo_dist.data import ImageProcessor
from dpo_dist.foundation.files import MEMO_FOLDER, text_digest
from dpo_dist.foundation.text import without_secrets
from dpo_dist.model.exactness import StartCheck
from dpo_dist.model.files.folder import (
    ADAPTER_CONFIG,
    is_adapter,
    model_folder,
    read_model_json,
    tokenizer_folder,
)
from dpo_dist.model.files.load import load_config, load_packed, load_weights, tokenizer_digest
from dpo_dist.model.files.manifest import check_base, check_undamaged
from dpo_dist.model.files.stops import folder_stops
from dpo_dist.model.lora import TRAINED, add_saved, load_adapter
from dpo_dist.model.packed import PackedCausalLM
from dpo_dist.reference.digest import digest_model
from dpo_dist.reference.engine import scoring_config


@dataclass(frozen=True)
class ModelSource:
    """The files of a model; for an adapter `folder` is the base's."""

    name: str  # as configured
    key: str  # of the configuration, for errors
    folder: Path
    adapter: Path | None
    revision: str | None
    digest: str  # of all files on which responses depend, with the tokenizer's

    @property
    def tokenizer_folder(self) -> Path:
        """The adapter's folder if it has a tokenizer, else the model's."""
        return tokenizer_folder(self.folder, self.adapter)

    def provenance(self) -> dict[str, Any]:
        """Return name, revision and digest, as records store them; secrets are hidden."""
        return {"name": without_secrets(self.name), "revision": self.revision, "digest": self.digest}

    def check(self, store: Path | None) -> None:
        """Check files that this program wrote, and the base of an adapter; `store` caches digests.

        Reads no weights of other people's models.
        """
        memo = None if store is None else store / MEMO_FOLDER
        check_undamaged(self.folder, memo)
        if self.adapter is not None:
            check_undamaged(self.adapter, memo)
            self.check_is_base_of(self.adapter, store)

    def check_is_base_of(self, folder: Path, store: Path | None) -> None:
        """Check that the model in `folder` was trained from this one; `store` caches digests."""
        check_base(folder, self.folder, lambda: digest_model(self.folder, store).base)

    def load(self, model: ModelConfig, device: torch.device) -> Any:
        """Return a language model of transformers, whole on `device`, with the adapter if there is one."""
        model = ModelConfig(**vars(model))  # also if the run of `model` trains a reward model
        model_config = load_config(self.folder, model, self.key)
        causal_lm: Any = load_weights(self.folder, model_config, model, device, key=self.key)
        if self.adapter is not None:
            add_saved(causal_lm, self.adapter, TRAINED, self.key)
        return causal_lm.eval()

    def load_packed(
        self,
        model: ModelConfig,
        longest: int,
        device: torch.device,
        processor: ImageProcessor | None = None,
    ) -> PackedCausalLM:
        """Return the model, checked, for log-probs of sequences of up to `longest` tokens."""
        model_config = replace(scoring_config(model, model.quantization), fused=FusedLayers.none)
        packed = load_packed(self.folder, model_config, longest, device, self.key)
        if self.adapter is not None:
            load_adapter(packed, self.adapter, self.key)
        packed.eval()
        images = () if processor is None else processor.invented
        StartCheck(packed, packed, device, longest, self.key, images=images).choose_arrangement()
        return packed


def find_files(name: str, model: ModelConfig, key: str) -> ModelSource:
    """Return the files of a model or adapter, given as folder or hub name; the digest is empty.

    `model.revision` counts for `model.path` only.
    """
    revision = model.revision if name == model.path else None
    folder = model_folder(name, revision, key, accepts_adapter=True)
    adapter = None
    if is_adapter(folder):
        adapter = folder
        adapter_config: dict[str, Any] = read_model_json(adapter / ADAPTER_CONFIG)
        base = str(adapter_config.get("base_model_name_or_path"))
        commit = adapter_config.get("revision")
        if Path(base).expanduser().is_dir():
            commit = None
        folder = model_folder(base, commit, key)
    return ModelSource(name, key, folder, adapter, revision, "")


def find_model(name: str, model: ModelConfig, store: Path, key: str) -> ModelSource:
    """Return the same as `find_files`, with the digest of the files, which `store` caches."""
    source = find_files(name, model, key)
    folder = source.folder
    adapter = source.adapter
    files = digest_model(folder, store, remote_code=model.trust_remote_code, adapter=adapter)
    parts = [files.digest, tokenizer_digest(source.tokenizer_folder)]
    if model.images is not None:
        parts.append(tokenizer_digest(folder, with_images=True))
    parts += [f"ends with {token}" for token in sorted(folder_stops(folder))]
    return replace(source, digest=text_digest(" ".join(parts)))
