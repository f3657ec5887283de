"""The models of a script: those in memory are written to folders, from which a run loads, and read again."""

import copy
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from dpo_dist import api
from dpo_dist.config.load import from_yaml
from dpo_dist.config.run_folder import best_checkpoint, checkpoint_folders
from dpo_dist.config.schema import FinalModel
from dpo_dist.distributed.checkpoint.saver import SavedSlices
from dpo_dist.distributed.deepspeed_internals import is_sharded
from dpo_dist.foundation.errors import ConfigError, RunOutcome
from dpo_dist.foundation.files import locked, staged_folder, write_text
from dpo_dist.foundation.process import this_rank
from dpo_dist.model.architectures import auto_class
from dpo_dist.model.files.folder import is_adapter, model_folder, weight_files
from dpo_dist.model.lora import find_modules, tied_pair
from dpo_dist.tools.convert.arguments import adapter_keys, refused
from dpo_dist.trl.command import ScriptCommand
from dpo_dist.trl.unseen import changed_weights, frozen_weights, hooks, own_tokenizer, weight_sums
from dpo_dist.verbs import export


class ScriptModels:
    """The policy, the reference and the tokenizer of a trainer: in memory, and as what a run reads."""

    def __init__(
        self,
        command: ScriptCommand,
        model: Any,
        ref_model: Any,
        peft_config: Any,
        tokenizer: Any,
        *,
        has_adapter: bool,
        is_quantized: bool,
    ) -> None:
        """Collect the keys of the models, and raise for what would be trained in another way.

        No weights are written before `save`. `tokenizer`: None for the model's own.
        """
        self._command, self._peft_config, self._has_adapter = command, peft_config, has_adapter
        self.theirs, self.ours = dict[str, Any](), dict[str, Any]()
        """Keys of the command, of TRL and of dpo_dist; `save` changes those of models in memory."""
        self.policy: Any = None if isinstance(model, str) or peft_config is not None else model
        """The model that a script reads and that gets the trained weights: the one that it passed, or one
        that is loaded when it is first read. With `peft_config` that is another object, as in TRL."""
        self._given_reference, self._loaded_reference = ref_model, None
        self.summary: dict[str, Any] | None = None
        """What `api.train` has returned; None before this trainer trains."""
        self._unsaved = dict[str, tuple[Any, Any]]()
        """Models in memory by their key, each with the tokenizer that is written beside it."""
        self._sums = dict[str, dict[str, int]]()
        """For each model in memory the sum of each weight, as `save` or a run left it."""
        self._tokenization: tuple[Any, Any] = (None, None)
        """The tokens and the chat template as `save` left them."""
        args, options = command.args, command.theirs["model_init_kwargs"]
        named = {"revision": options.get("revision"), "trust_remote_code": args.trust_remote_code}

        # The policy: a PeftModel is an adapter to continue on the base that it names.
        if hasattr(model, "peft_config"):
            if peft_config is not None:
                raise refused("peft_config", "with a PeftModel", "merge_and_unload its adapter first")
            self.theirs["use_peft"] = True
            self._place("model.adapter.path", model, None)
            model = base_of(model, options.get("revision"))
        elif is_quantized and not isinstance(model, str):
            model = model.config.name_or_path  # from which it is quantized again

        # The tokenizer: a run reads the one beside the weights, so that another one needs a copy of them.
        source = model if isinstance(model, str) else model.config.name_or_path
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(source, **named)
        elif isinstance(model, str):
            kept = AutoTokenizer.from_pretrained(source, **named)
            if tokenization(kept) != tokenization(tokenizer):
                kind = auto_class(AutoConfig.from_pretrained(source, **named), args.trust_remote_code)
                model = kind.from_pretrained(source, use_safetensors=True, **options | named)
            elif tokenizer.chat_template and tokenizer.chat_template != kept.chat_template:
                # But another template is only a key.
                self.ours["data.chat_template"] = str(command.folder / "chat_template.jinja")
                write_text(command.folder / "chat_template.jinja", tokenizer.chat_template)
        self.tokenizer = tokenizer
        self._place("model.path", model, tokenizer)
        if ref_model is not None:
            self._place("reference.path", ref_model, tokenizer)

        # What the model's config decides: a new adapter's layers, and the loss of routers.
        self._config = AutoConfig.from_pretrained(model, **named) if isinstance(model, str) else model.config
        if peft_config is not None:
            self.theirs |= adapter_keys(peft_config, self._config.model_type)
            with torch.device("meta"):
                config = copy.deepcopy(self._config)
                whole = self._kind.from_config(config) if isinstance(model, str) else model
            _check_tied_modules(peft_config, whole)
            with command.in_words_of_the_script():
                find_modules(whole, list(peft_config.modules_to_save or ()))
        of_model = getattr(self._config.get_text_config(), "router_aux_loss_coef", None)
        given = args.router_aux_loss_coef
        if given and of_model is None:
            remedy = f"leave it out: {self._config.model_type} is no mixture of experts"
            raise refused("router_aux_loss_coef", str(given), remedy)
        chosen = "model" if given is None and of_model else given
        self.theirs["router_aux_loss_coef"] = chosen or None

    def _place(self, key: str, model: Any, tokenizer: Any) -> None:
        """Set a key to the name of a model; to any folder for one in memory, until `save` knows its own."""
        self.ours[key] = model if isinstance(model, str) else f"{self._command.folder}/models/{key}"
        if not isinstance(model, str):
            self._unsaved[key] = model, tokenizer

    def save(self) -> None:
        """Write the models in memory, and keep what tells later whether a script has changed them."""
        for key, (model, tokenizer) in self._unsaved.items():
            self.ours[key] = saved(model, tokenizer, self._command.folder / "models")
        self._unsaved.clear()
        self._sums = {"model": weight_sums(self.policy), "ref_model": weight_sums(self._given_reference)}
        self._tokenization = tokenization(self.tokenizer), copy.copy(self.tokenizer.chat_template)

    def changes(self) -> list[ConfigError]:
        """Return errors for what a script has changed in models or the tokenizer since `save`."""
        model = self.start if self.policy is None else self.policy
        found = changed_models(model, self._given_reference, has_adapter=self._has_adapter)
        tokens, template = self._tokenization
        has_other_tokens = tokenization(self.tokenizer) != tokens
        if has_other_tokens or self.tokenizer.chat_template != template:
            got = "other tokens" if has_other_tokens else "another chat_template"
            remedy = "change it before the trainer is made: records are encoded as it was then"
            found.append(refused("trainer.processing_class", got, remedy))
        found += own_tokenizer(self.tokenizer, "trainer.processing_class")
        # A run that goes on reads the weights of its checkpoint.
        return found if self.summary is not None else found + self.changed_weights()

    def changed_weights(self) -> list[ConfigError]:
        """Return errors for weights that a script has changed since `save`, or since it trained them."""
        loaded, given = self._loaded_reference, self._given_reference
        models = {"model": self.policy, "ref_model": given if loaded is None else loaded}
        return [
            error for name, sums in self._sums.items() for error in changed_weights(name, models[name], sums)
        ]

    @property
    def start(self) -> str:
        """The folder or name of the weights from which training starts."""
        return str(self.ours.get("model.adapter.path", self.ours["model.path"]))

    def trained(self) -> str | None:
        """Return the folder of the trained model, None before training.

        Of a run that a callback stopped it is written now, on rank 0, from its last or its best checkpoint.
        """
        if self.summary is None:
            return None
        run = self._command.run
        if self.summary["exit"] == RunOutcome.completed:
            return str(run.model)
        # A model that is there is of an earlier, shorter run.
        if not (folders := checkpoint_folders(run.checkpoints)):
            return None
        config = from_yaml(run.config.read_text())
        best = best_checkpoint(run.checkpoints) if config.trainer.final is FinalModel.best else None
        exported = run.exported / (best or folders[0].name)
        if this_rank() == 0 and not exported.is_dir():
            with api.as_guest():
                export.main(config)
        self._command.wait_for_rank_0(f"written {exported}", exported.is_dir)
        return str(exported)

    def folder(self) -> Path:
        """Return the folder of the trained model, before training of the one that was given."""
        revision = self._command.theirs["model_init_kwargs"].get("revision")
        return Path(self.trained() or model_folder(self.start, revision, accepts_adapter=True))

    def in_memory(self) -> Any:
        """Return the policy, which is loaded at the first time if the script passed a name."""
        if self.policy is None:
            self.policy = self._load()
            self._sums["model"] = weight_sums(self.policy)
        return self.policy

    def take_trained(self) -> None:
        """Give the trained weights to a policy in memory, and forget a loaded reference: it may follow."""
        self._loaded_reference = None
        if isinstance(self.policy, PeftModel):
            self.policy.load_adapter(str(self.trained()), "default", is_trainable=True)
        elif self.policy is not None:
            self.policy.load_state_dict(self._load().state_dict())
        self._sums["model"] = weight_sums(self.policy)

    def reference(self) -> Any:
        """Return the reference that was given, or load it, as it is after training; None as in TRL."""
        if self._given_reference is not None and not isinstance(self._given_reference, str):
            return self._given_reference
        args = self._command.args
        if self._given_reference is None and (self._has_adapter or args.precompute_ref_log_probs):
            return None
        if self._loaded_reference is None:
            source = self.ours.get("reference.path", self.ours["model.path"])
            reference = self._loaded_reference = self._from_files(source).requires_grad_(False)
            folders = checkpoint_folders(self._command.run.checkpoints) if self.summary is not None else []
            if args.sync_ref_model and folders:
                written = SavedSlices.find(folders[0], "reference")
                for name, weight in reference.named_parameters():
                    weight.data.copy_(written.whole(name))
            self._sums["ref_model"] = weight_sums(reference)
        return self._loaded_reference

    @property
    def _kind(self) -> Any:
        return auto_class(self._config, self._command.args.trust_remote_code)

    def _from_files(self, source: str) -> Any:
        options = {"use_safetensors": True, "trust_remote_code": self._command.args.trust_remote_code}
        options |= {"dtype": "float32"} | self._command.theirs["model_init_kwargs"]
        return self._kind.from_pretrained(source, **options)

    def _load(self) -> Any:
        """Load the trained model, else the one that was named; with an adapter as a `PeftModel`."""
        trained = self.trained()
        adapter = trained if trained and is_adapter(Path(trained)) else None
        model = self._from_files(self.ours["model.path"] if adapter or not trained else trained)
        if adapter:
            return PeftModel.from_pretrained(model, adapter, is_trainable=True)
        return model if trained or self._peft_config is None else get_peft_model(model, self._peft_config)


def _check_tied_modules(peft_config: Any, model: Any) -> None:
    """Raise if an adapter saves one module of two that share a weight: peft would train it as a copy."""
    wanted, shared = list(peft_config.modules_to_save or ()), tied_pair(model)
    tied = [one for one in wanted if any(f".{name}".endswith(f".{one}") for name in shared)]
    if tied and (len(tied) == 1 or not peft_config.ensure_weight_tying):
        every = [*dict.fromkeys([*wanted, *(name.rpartition(".")[2] for name in shared)])]
        remedy = f"write LoraConfig(modules_to_save={every}, ensure_weight_tying=True)"
        got = f"{', '.join(tied)}, which shares its weight"
        raise refused("peft_config.modules_to_save", got, remedy)


def uncompiled(model: Any) -> Any:
    """Return the model inside one of `torch.compile`, which has its weights: a run compiles its own."""
    parts = dict(model.named_children()) if isinstance(model, torch.nn.Module) else {}
    return parts.get("_orig_mod", model)


def changed_models(model: Any, ref_model: Any, *, has_adapter: bool) -> list[ConfigError]:
    """Return errors for what a script has changed in models in memory, which are saved and loaded again."""
    found = hooks(model, "model") + hooks(ref_model, "ref_model")
    # Below an adapter all weights are frozen, and quantized ones always.
    if isinstance(model, PeftModel) or not (has_adapter or hasattr(model, "quantization_method")):
        found += frozen_weights(model, "model")
    if model is ref_model and not isinstance(model, str):
        remedy = "leave ref_model out: the reference is a copy of model"
        found.append(refused("ref_model", "`model` and `ref_model` cannot be the same object", remedy))
    return found


def base_of(model: Any, revision: str | None) -> str:
    """Return the name by which a `PeftModel`'s base is trained; check that its weights are the same."""
    if [*model.peft_config] != ["default"]:
        remedy = "pass a PeftModel whose only adapter has the name 'default'"
        raise refused("model", f"a PeftModel with {', '.join(model.peft_config)}", remedy)
    base = str(model.peft_config["default"].base_model_name_or_path)
    if hasattr(model.config, "quantization_config"):
        return base
    weights = {
        re.sub(r"^base_model\.model\.|\.(base_layer|original_module)(?=\.)", "", name): weight
        for name, weight in model.state_dict().items()
    }
    for file in weight_files(model_folder(base, revision)):
        if file.suffix == ".json":
            continue
        with safe_open(file, "pt") as stored:
            for name in weights.keys() & set(stored.keys()):
                weight = weights[name].cpu()
                if not torch.equal(stored.get_tensor(name).to(weight.dtype), weight):
                    remedy = "save the base by save_pretrained, and load it from there before its adapter"
                    raise refused("model", f"a PeftModel whose {name} is not that of {base}", remedy)
    return base


def tokenization(tokenizer: Any) -> Any:
    """Return what decides the ids of a text: the tokenizer's parts, without its padding."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    return {**parts, "padding": None, "truncation": None, "eos": tokenizer.eos_token_id}


def saved(model: Any, tokenizer: Any, root: Path) -> str:
    """Save a model to a folder below `root` that its content names, unless it is there; return the folder.

    Collective where a script has joined the processes: transformers then saves on rank 0 only.
    """
    digest = hashlib.blake2b(model.config.to_json_string().encode(), digest_size=8)
    if tokenizer is not None:
        digest.update(repr((tokenization(tokenizer), tokenizer.chat_template)).encode())
    for name, adapter in getattr(model, "peft_config", {}).items():
        options = {
            key: sorted(value) if isinstance(value, set) else value for key, value in vars(adapter).items()
        }
        digest.update(repr((name, sorted(options.items()))).encode())
    if any(map(is_sharded, model.parameters())):
        remedy = "pass its name or folder: under this launcher transformers loads only a part in a process"
        raise refused("model", f"a {type(model).__name__} whose weights ZeRO-3 shards", remedy)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    folder, is_joined = root / digest.hexdigest(), dist.is_initialized()
    if not is_joined or this_rank() == 0:
        with locked(folder.with_suffix(".lock"), "saves this model", waits=True):
            if not folder.exists():
                with staged_folder(folder) as temporary:
                    for part in filter(None, (model, tokenizer)):
                        part.save_pretrained(temporary)
    written = [str(folder)]
    if is_joined:
        dist.broadcast_object_list(written)
    return written[0]
