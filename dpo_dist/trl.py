"""TRL's trainers by one import: `from dpo_dist.trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer`.

The arguments of TRL 1.16 are translated by the table of `dpo-dist convert` into a file in `output_dir`, with
which `api.train` runs; `dpo-dist train` can go on with it.
"""

import copy
import hashlib
import json
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, trainer_pt_utils
from transformers.trainer_callback import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import EvalPrediction, TrainOutput

from dpo_dist import api
from dpo_dist.config.load import from_yaml, load_run_config
from dpo_dist.config.metrics import results_name
from dpo_dist.config.mistakes import raise_all
from dpo_dist.config.run_folder import RunFolder, best_checkpoint, checkpoint_folders
from dpo_dist.config.schema import FinalModel, SourceConfig
from dpo_dist.data.read.files import write_records
from dpo_dist.foundation.errors import ConfigError, ExitCode, RunOutcome, StoppedError
from dpo_dist.foundation.files import locked, staged_folder, write_text
from dpo_dist.foundation.process import this_rank
from dpo_dist.model.architectures import auto_class
from dpo_dist.model.files.folder import is_adapter, model_folder, weight_files
from dpo_dist.tools.convert.arguments import (
    DPOConfig,
    KTOConfig,
    TrainerArguments,
    adapter_keys,
    not_offered,
    refused,
)
from dpo_dist.tools.convert.launcher import launcher_keys
from dpo_dist.tools.convert.reading import ForeignRun
from dpo_dist.tools.convert.translate import translate_run
from dpo_dist.tools.convert.unseen import (
    changed_arguments,
    changed_attributes,
    frozen_weights,
    hooks,
    overrides,
)
from dpo_dist.verbs import evaluate, export

_EVENTS = ("on_init_end", "on_train_begin", "on_log", "on_evaluate", "on_save", "on_train_end")
_BITS = ("load_in_", "bnb_4bit_quant_type")


class DPOTrainer:
    """TRL's `DPOTrainer`: its arguments, methods and `state`; trains with dpo_dist."""

    config: type[TrainerArguments] = DPOConfig
    log_metrics = trainer_pt_utils.log_metrics
    save_metrics = trainer_pt_utils.save_metrics
    save_state = trainer_pt_utils.save_state

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: TrainerArguments | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: Iterable[TrainerCallback] | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        **others: Any,
    ) -> None:
        """Write models and data in memory, and the translation, below `output_dir`; name what is refused."""
        raise_all(not_offered(self.config, args, others))
        raise_all(self._overrides(args) + _unseen(model, ref_model, has_adapter=peft_config is not None))
        name = Path(model if isinstance(model, str) else model.config.name_or_path).name
        self.args = args or self.config(output_dir=f"{name}-{self.config.__name__[:3]}")
        self.folder = Path(self.args.output_dir or "trainer_output")
        self.run = RunFolder(self.folder / "run")
        self.processing_class, self.compute_metrics = processing_class, compute_metrics
        self.train_dataset, self.eval_dataset, self.ref_model = train_dataset, eval_dataset, ref_model
        self.state, self.control, self.callbacks = TrainerState(), TrainerControl(), list[TrainerCallback]()
        is_main = self.is_world_process_zero()
        say = print if is_main else self.end
        self.accelerator = SimpleNamespace(print=say, is_main_process=is_main, wait_for_everyone=self.end)
        self._keys = self.args.keys(_weights(model))
        self._own: dict[str, Any] = {"run.dir": str(self.run), "run.root": str(self.folder)}
        self._words, self._has_trained = list[str](), False
        self._given: Any = None if isinstance(model, str) or peft_config is not None else model
        for callback in callbacks or ():
            self.add_callback(callback)
        self._own |= {"samples.prompts": 0, "data.train": self._sources(train_dataset, "train_dataset")}
        self._eval = [] if eval_dataset is None else self._sources(eval_dataset, "eval_dataset")
        sets = [Path(source["path"]).read_bytes().splitlines() for source in self._own["data.train"]]
        columns = self._own["data.train"][0].get("columns", {})
        self._own["data.unpair"] = self.config is KTOConfig and "chosen" in columns
        if "images" in columns:
            has_adapter = peft_config is not None or hasattr(model, "peft_config")
            trained = "none" if has_adapter else "tower"
            self._own |= {"model.images.train": trained, "data.images": str(Path.cwd())}
        if self.args.eval_strategy != "no":
            self._own["data.eval"] = self._eval
        given = quantization_config or self._keys["model_init_kwargs"].pop("quantization_config", None)
        given = given or getattr(getattr(model, "config", None), "quantization_config", None)
        if given is not None:
            self._keys |= {key: value for key, value in given.to_dict().items() if key.startswith(_BITS)}
            if not isinstance(model, str) and not hasattr(model, "peft_config"):
                model = model.config.name_or_path  # whose weights are quantized again
        self._place_models(model, ref_model, peft_config)
        records = sum(map(len, sets)) * (2 if self._own["data.unpair"] else 1)
        self._keys |= self.args.intervals(records)
        raise_all(self.args.faults(records, has_evaluation=bool(self._eval)))
        self._translate()
        self._arguments = copy.deepcopy(dict(vars(self.args)))
        given_once = ("train_dataset", "eval_dataset", "ref_model", "processing_class")
        self._given_once = {name: getattr(self, name) for name in given_once}
        self._call("on_init_end")

    def add_callback(self, callback: Any) -> None:
        """Add a callback, of which the events in `_EVENTS` happen: on rank 0, at the rows of the log."""
        callback = callback() if isinstance(callback, type) else callback
        if isinstance(callback, EarlyStoppingCallback):
            if callback.early_stopping_threshold:
                remedy = "set it to 0: any new best value counts"
                raise refused("callbacks", "early_stopping_threshold", remedy)
            self._keys["early_stopping_patience"] = callback.early_stopping_patience
            if self._words:  # else the trainer is still being made
                self._translate()
            return
        kind = type(callback)
        for name, unchanged in vars(TrainerCallback).items():
            if name.startswith("on_") and name not in _EVENTS and getattr(kind, name) is not unchanged:
                remedy = f"of a callback there are {', '.join(_EVENTS)}; on_log can be at each step"
                raise refused("callbacks", f"{kind.__name__}.{name}", remedy)
        self.callbacks.append(callback)

    def train(self, resume_from_checkpoint: bool | str | None = None, **_: Any) -> TrainOutput:
        """Train, from the last checkpoint if there is one; return what TRL's trainer returns.

        `resume_from_checkpoint`: true: there must be one; a path: it must be the last one.
        """
        changed = changed_arguments(self.args, self._arguments) + changed_attributes(self, self._given_once)
        raise_all(self._overrides(self.args) + changed)
        last = self._last = next(iter(checkpoint_folders(self.run.checkpoints)), None)
        wanted = resume_from_checkpoint
        if wanted and last is None:
            remedy = "there is no checkpoint yet: leave it out, and train() continues one if there is one"
            raise refused("resume_from_checkpoint", str(wanted), remedy)
        if isinstance(wanted, str) and last is not None and last.resolve() != Path(wanted).resolve():
            raise refused("resume_from_checkpoint", wanted, f"pass True or {last}")
        self.control.should_training_stop = False
        self._call("on_train_begin")
        try:
            summary = api.train(self._words, on_row=self._on_row)
        except StoppedError as stop:  # before the first step
            self.accelerator.print(stop)
            raise SystemExit(ExitCode.preempted) from stop
        if summary["exit"] == RunOutcome.preempted and "on_row" not in summary["stopped_by"]:
            raise SystemExit(ExitCode.preempted)  # the script would take these weights for the trained model
        self._has_trained = True
        rows = [*filter(None, map(self._shown, api.read_metrics(self.run.path)))]
        losses = [row["loss"] for row in rows if "loss" in row]
        mean, steps = math.fsum(losses) / max(len(losses), 1), summary["steps"]
        metrics = {"train_runtime": summary["train_seconds"], "train_loss": mean}
        self.state.global_step, self.state.log_history = steps, [*rows, {**metrics, "step": steps}]
        self._note_checkpoint()
        if self._given is not None:
            if isinstance(self._given, PeftModel):
                self._given.load_adapter(str(self._result()), "default", is_trainable=True)
            else:
                self._given.load_state_dict(self._loaded().state_dict())
        self._call("on_train_end")
        return TrainOutput(steps, mean, metrics)

    def evaluate(
        self, eval_dataset: Any = None, _: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate the trained model, before training the one that was given; return the metrics."""
        raise_all(changed_attributes(self, {"eval_dataset": self._given_once["eval_dataset"]}))
        sources = (eval_dataset is None and self._eval) or self._sources(eval_dataset, "eval_dataset")
        config = load_run_config(self._words)
        data = [SourceConfig(**source) for source in sources]
        evaluation = replace(config.evaluation, model=self._result() or self._start, data=data)
        with api.as_guest():
            evaluate.main(replace(config, evaluation=evaluation))
        results = json.loads(self.run.evaluation.results.read_text())
        names = {source["label"]: f"{source['label']}_" for source in sources if "label" in source}
        metrics = {
            f"{metric_key_prefix}_{name}{key.removeprefix('eval_')}": value
            for label, name in (names or {"all": ""}).items()
            for key, value in results[results_name(label) if names else label].items()
            if key != "intervals"
        }
        if self.compute_metrics is not None:
            own = self.compute_metrics(self._predictions())
            metrics |= {f"{metric_key_prefix}_{key}": value for key, value in own.items()}
        self.state.log_history.append({**metrics, "step": self.state.global_step})
        self._call("on_evaluate", metrics=metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:  # noqa: ARG002
        """Keep a row of the run, and tell the callbacks: an override is called for each row."""
        self.state.log_history.append(logs)
        self._call("on_log", logs=logs)

    def save_model(self, output_dir: str | None = None, _: bool = False) -> None:
        """Copy the trained model, or the one that was given, with its tokenizer, to a folder."""
        options, folder = self._keys["model_init_kwargs"], Path(output_dir or self.folder)
        source = self._result() or model_folder(self._start, options.get("revision"), accepts_adapter=True)
        if this_rank() == 0:
            shutil.copytree(source, folder, dirs_exist_ok=True)
            if hasattr(self.processing_class, "image_processor"):
                self.processing_class.save_pretrained(folder)
            if "data.chat_template" in self._own:
                write_text(folder / "chat_template.jinja", self.processing_class.chat_template)

    @property
    def model(self) -> Any:
        """The model that was given, or loaded once; after `train` with the trained weights."""
        if self._given is None:
            self._given = self._loaded()
        return self._given

    def is_world_process_zero(self) -> bool:
        """Return whether this is the process that writes."""
        return this_rank() == 0

    def end(self, *_: Any, **__: Any) -> None:
        """Do nothing: trackers and processes have ended with the run, and its model has a card."""

    create_model_card = end

    def _overrides(self, args: TrainerArguments | None) -> list[ConfigError]:
        """Return errors for the methods of a subclass that nothing calls.

        A script calls `evaluate` and `save_model`; the loop of dpo_dist, other than TRL's, does not.
        """
        args = args or self.config()
        strategies = {"evaluate": args.eval_strategy, "save_model": args.save_strategy}
        by_script = {name for name in dir(DPOTrainer) if strategies.get(name, "no") == "no"}
        return overrides(self, by_script)

    def _loaded(self) -> Any:
        """Load the trained model, else the one that was named; with an adapter as a `PeftModel`."""
        trained, trust = self._result(), self.args.trust_remote_code
        adapter = trained if trained and is_adapter(Path(trained)) else None
        options = {"use_safetensors": True, "trust_remote_code": trust} | self._keys["model_init_kwargs"]
        source = self._own["model.path"] if adapter or not trained else trained
        model = auto_class(self._facts, trust).from_pretrained(source, **options)
        if adapter:
            return PeftModel.from_pretrained(model, adapter)
        return model if trained or self._peft is None else get_peft_model(model, self._peft)

    def _result(self) -> str | None:
        """Return the folder of the trained model; of a run that a callback stopped, write it first."""
        if not self._has_trained:
            return None
        if self.run.model.is_dir():
            return str(self.run.model)
        if not (folders := checkpoint_folders(self.run.checkpoints)):
            return None
        config = from_yaml(self.run.config.read_text())
        best = best_checkpoint(self.run.checkpoints) if config.trainer.final is FinalModel.best else None
        exported = self.run.exported / (best or folders[0].name)
        if this_rank() == 0 and not exported.is_dir():
            with api.as_guest():
                export.main(config)
        while not exported.is_dir():  # rank 0 writes it; if that fails, the launcher ends this process
            time.sleep(0.1)
        return str(exported)

    def _predictions(self) -> EvalPrediction:
        """Return the rewards of the last evaluation: of chosen and rejected, or of labelled responses."""
        scores = [*map(json.loads, self.run.evaluation.scores.read_bytes().splitlines())]
        if self.config is KTOConfig:
            rewards, labels = ([row[name] for row in scores] for name in ("reward", "label"))
        else:
            rewards = [[row["reward_chosen"], row["reward_rejected"]] for row in scores]
            labels = [0] * len(scores)
        return EvalPrediction(predictions=np.array(rewards), label_ids=np.array(labels, dtype=int))

    def _shown(self, row: dict[str, float]) -> dict[str, float]:
        """Return a row, a set's name where TRL has it: `eval_NAME_loss`; {}: TRL has no such row."""
        if row["step"] == 0 and not self.args.eval_on_start:
            return {}
        for label in (source["label"] for source in self._eval if "label" in source):
            end = f"/{label}" if len(self._eval) > 1 else ""  # the only set has no name in a row
            named = [key for key in row if key.startswith("eval_") and key.endswith(end)]
            names = {key: f"eval_{label}_{key.removeprefix('eval_').removesuffix(end)}" for key in named}
            row = {names.get(key, key): value for key, value in row.items()}
        return row

    def _on_row(self, row: dict[str, float]) -> bool:
        """Call the callbacks, on rank 0; return whether one of them ends the run."""
        if not (logs := self._shown(row)):
            return False
        self.state.global_step, self.state.epoch = int(row["step"]), row.get("epoch")
        self.log(logs)
        if "eval_loss" in row:
            self._call("on_evaluate", metrics=logs)
        self._note_checkpoint()
        return bool(self.control.should_training_stop)

    def _note_checkpoint(self) -> None:
        newest = next(iter(checkpoint_folders(self.run.checkpoints)), None)
        if newest != self._last:
            self._last = newest
            self._call("on_save")

    def _call(self, event: str, **values: Any) -> None:
        for callback in self.callbacks if this_rank() == 0 else ():
            getattr(callback, event)(self.args, self.state, self.control, **values)
            if self.control.should_save or self.control.should_evaluate:
                got = f"{type(callback).__name__}.{event} sets should_save or should_evaluate"
                raise refused("callbacks", got, "set save_steps and eval_steps")

    def _launched(self) -> dict[str, Any]:
        """Return the keys that the launcher's file means; the arguments' own way of sharding wins."""
        if self.args.deepspeed or self.args.fsdp:
            return {}
        is_quantized = any(key.startswith(_BITS) for key in self._keys | self._keys["model_init_kwargs"])
        is_half = bool(self._keys.get("bf16", True) or self.args.fp16)
        keys, said = launcher_keys(os.environ, is_quantized=is_quantized, is_half=is_half)
        for line in said:
            self.accelerator.print(line)
        return keys

    def _place_models(self, model: Any, ref_model: Any, peft_config: Any) -> None:
        """Set the keys of the models; save those in memory."""
        own, tokenizer, options = self._own, self.processing_class, self._keys["model_init_kwargs"]
        named = {"revision": options.get("revision"), "trust_remote_code": self.args.trust_remote_code}
        own |= self._launched()
        if hasattr(model, "peft_config"):
            if peft_config is not None:
                raise refused("peft_config", "with a PeftModel", "merge_and_unload its adapter first")
            self._keys |= {"use_peft": True, "adapter_name_or_path": self._saved(model, None)}
            model = _base_of(model, options.get("revision"))
        source = model if isinstance(model, str) else model.config.name_or_path
        if tokenizer is None:
            tokenizer = self.processing_class = AutoTokenizer.from_pretrained(source, **named)
        elif isinstance(model, str):
            kept = AutoTokenizer.from_pretrained(source, **named)
            if _tokenization(kept) != _tokenization(tokenizer):
                kind = auto_class(AutoConfig.from_pretrained(source, **named), self.args.trust_remote_code)
                model = kind.from_pretrained(source, use_safetensors=True, **options | named)
            elif tokenizer.chat_template and tokenizer.chat_template != kept.chat_template:
                own["data.chat_template"] = str(self.folder / "chat_template.jinja")
                write_text(self.folder / "chat_template.jinja", tokenizer.chat_template)
        own["model.path"] = model if isinstance(model, str) else self._saved(model, tokenizer)
        self._start, self._peft = self._keys.get("adapter_name_or_path", own["model.path"]), peft_config
        if ref_model is not None:
            is_path = isinstance(ref_model, str)
            own["reference.path"] = ref_model if is_path else self._saved(ref_model, tokenizer)
        self._facts = AutoConfig.from_pretrained(own["model.path"], **named)
        if peft_config is not None:
            self._keys |= adapter_keys(peft_config, self._facts.model_type)
        experts = getattr(self._facts.get_text_config(), "router_aux_loss_coef", None)
        given = self.args.router_aux_loss_coef
        self._keys["router_aux_loss_coef"] = (experts and "model" if given is None else given) or None

    def _saved(self, model: Any, tokenizer: Any) -> str:
        """Save a model to a folder that its content names, unless it is there; return the folder.

        Collective where a script has joined the processes: transformers then saves on rank 0 only.
        """
        digest = hashlib.blake2b(model.config.to_json_string().encode(), digest_size=8)
        if tokenizer is not None:
            digest.update(repr((_tokenization(tokenizer), tokenizer.chat_template)).encode())
        if any(hasattr(weight, "ds_id") for weight in model.parameters()):
            remedy = (
                "pass its name or folder: under this launcher transformers loads only a part in a process"
            )
            raise refused("model", f"a {type(model).__name__} whose weights ZeRO-3 shards", remedy)
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        folder, is_joined = self.folder / "models" / digest.hexdigest(), dist.is_initialized()
        if not is_joined or this_rank() == 0:
            with locked(folder.with_suffix(".lock"), "saves this model", waits=True):
                if not folder.exists():
                    with staged_folder(folder) as temporary:
                        for part in filter(None, (model, tokenizer)):
                            part.save_pretrained(temporary)
        saved = [str(folder)]
        if is_joined:
            dist.broadcast_object_list(saved)
        return saved[0]

    def _sources(self, given: Any, name: str) -> list[dict[str, Any]]:
        """Write records in memory, or a mapping of several sets, to files; return them as sources."""
        sets = given if isinstance(given, Mapping) else {"": given}
        if given is None or not sets:
            raise ConfigError("there are no records", where=name, remedy="pass a datasets.Dataset")
        folder = self.folder / "encoded" / "records"
        files = {label: write_records(one, folder, name) for label, one in sets.items()}
        labels = {label: {"label": label} if label else {} for label in files}
        return [{"path": str(file), **labels[label], **_as_trl_reads(file)} for label, file in files.items()]

    def _translate(self) -> None:
        """Write the file of the run; raise if an argument with an effect has no translation."""
        name = self.config.__name__
        translation = translate_run(ForeignRun("TRL", self._keys, name), self._own)
        given = self._keys | self._keys["model_init_kwargs"] | self._keys.get("lr_scheduler_kwargs", {})
        faults = [
            refused(key, str(given.get(key)), f"{why}; keys of dpo_dist go into {name}(words=[...])")
            for key, why in translation.reasons.items()
            if key not in translation.unneeded and key not in translation.unused
        ]
        raise_all(faults)
        for key, why in translation.unused.items():
            warnings.warn(f"{key}: {why}", stacklevel=4)
        file = self.folder / "dpo_dist.yaml"
        write_text(file, translation.as_file())
        self._words = [str(file), *self.args.words]


class KTOTrainer(DPOTrainer):
    """TRL's `KTOTrainer`: as `DPOTrainer`, on labelled responses, or on pairs that are taken apart."""

    config = KTOConfig


def _weights(model: Any) -> torch.dtype | None:
    """Return the type in which a model in memory is trained; None: by the arguments."""
    is_named = isinstance(model, str) or hasattr(model, "quantization_method")
    return None if is_named else getattr(model, "dtype", None)


def _unseen(model: Any, ref_model: Any, *, has_adapter: bool) -> list[ConfigError]:
    """Return errors for what a script has changed in models in memory, which are saved and loaded again."""
    found = hooks(model, "model") + hooks(ref_model, "ref_model")
    # Below an adapter all weights are frozen, and quantized ones always.
    if isinstance(model, PeftModel) or not (has_adapter or hasattr(model, "quantization_method")):
        found += frozen_weights(model, "model")
    return found


_COLUMNS = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "completion": "completion"}
_COLUMNS |= {"label": "label", "images": "images", "image": "images"}
_COLUMNS |= {"tools": "tools", "chat_template_kwargs": "chat_template_kwargs"}
"""The columns that TRL reads, and the fields of dpo_dist for them."""
_OF_MESSAGES = ("tools", "chat_template_kwargs")


def _as_trl_reads(file: Path) -> dict[str, Any]:
    """Return the columns and the format by which records are read as by TRL: texts stay texts, without a
    template, and no other column counts, such as `system` or `margin`."""
    with file.open(encoding="utf-8") as lines:
        first = json.loads(next(lines))
        names = set(first).union(*map(json.loads, lines))  # a list's first record may lack a column
    columns = {field: name for name, field in _COLUMNS.items() if name in names}
    response = first.get("chosen", first.get("completion"))
    if response is None:  # which TRL cannot read
        return {}
    read: dict[str, Any] = {}
    if isinstance(response, str) and isinstance(first.get("prompt") or "", str) and "images" not in columns:
        columns = {field: name for field, name in columns.items() if field not in _OF_MESSAGES}
        plain = "text" if "prompt" in columns else "implicit_prompt"
        read = {"format": plain if "chosen" in first else "labelled_text"}
    return {"columns": columns | {"*": None}, **read}


def _base_of(model: Any, revision: str | None) -> str:
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


def _tokenization(tokenizer: Any) -> Any:
    """Return what decides the ids of a text: the tokenizer's parts, without its padding."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    return {**parts, "padding": None, "truncation": None, "eos": tokenizer.eos_token_id}
