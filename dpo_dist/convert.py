"""Translate a file of keys of TRL, LLaMA-Factory or axolotl, YAML or JSON, into one for `dpo-dist train`.

Its comments name every key that is not translated, and why.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dpo_dist.config.keys import as_written, run_keys
from dpo_dist.config.load import FAILURES, parse_overrides, read_keys
from dpo_dist.config.mistakes import SCHEMA, answers_to, as_sources, as_tree, composition_error, fits, meant
from dpo_dist.config.mistakes import names_of_others as names
from dpo_dist.config.rules import RULES, keys_of, resolve_reference
from dpo_dist.foundation.errors import ConfigError, ExitCode
from dpo_dist.foundation.exit import Arguments, exit_after
from dpo_dist.foundation.files import write_text
from dpo_dist.foundation.streams import print_line, print_result
from dpo_dist.foundation.text import without_secrets

_EMPTY: tuple[Any, ...] = (None, "", [], {})
_KEYS = {"loss": "loss.kind", "parallelism": "parallelism.kind", "reference": "reference.mode"}
_KEYS |= {"optim": "optim.kind", "tracking": "tracking.wandb"}
"""The key that a preset sets; presets of losses set others too, by defaults of their papers."""
_SIGNS = {"axolotl": {"base_model"}, "LLaMA-Factory": {"stage", "finetuning_type", "cutoff_len"}}
_STAGES = {"3": "zero3", "2": "zero2", "1": "ddp", "0": "ddp"}
_BATCH = "trainer.global_batch_pairs"
_OF_SOURCES = (
    *("path", "id", "name", "config", "split", "revision", "data_dir", "data_files", "weight"),
    *("limit", "type", "ds_type"),
)
_LONGEST = 60


class Conversion:
    """A file of another trainer: its values by our keys, and comments on what is not translated."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._left = {str(key): value for key, value in content.items()}
        for name in ("lr_scheduler_kwargs", "model_init_kwargs"):  # their keys have names of their own
            if isinstance(inner := content.get(name), dict):
                self._left |= inner
                del self._left[name]
        self.trainer = next((name for name, keys in _SIGNS.items() if keys & content.keys()), "TRL")
        self.values, self.comments = dict[str, Any](), list[str]()
        self.batch = ""
        self._origins: dict[str, tuple[str, Any]] = {}
        for part in (self._data, self._batch, self._adapter, self._machine, self._numbers):
            part()
        # `save_strategy: no` counts, not the `save_steps` beside it.
        for key in sorted(self._left, key=lambda name: not name.endswith("strategy")):
            if self._left[key] not in _EMPTY:
                self._translate(key, self._left[key])
        if empty := [key for key, value in self._left.items() if value in _EMPTY]:
            self.comments.append(f"{', '.join(empty)}: empty")
        self._combine()
        defaults = names()["defaults"][self.trainer]
        self.defaults = [key for key in defaults if key not in self.values]
        self.values |= {key: defaults[key] for key in self.defaults}
        self._obey_rules()

    def yaml(self, name: str) -> str:
        """Return the file, without secrets; `name` is that of the file which it comes from."""
        order = list(run_keys())
        keys = as_tree({key: self.values[key] for key in sorted(self.values, key=order.index)})
        about = [f"From {name}, read as a file of {self.trainer}."]
        if self.defaults:
            about.append(f"Not in that file, so its defaults: {', '.join(self.defaults)}.")
        about += [self.batch] if self.batch else []
        comments = [*about, *(["Not translated:"] if self.comments else []), *self.comments]
        text = "".join(f"# {line}\n" for line in comments)
        return str(without_secrets(text + yaml.safe_dump(keys, sort_keys=False, allow_unicode=True)))

    def _take(self, *keys: str, default: Any = None) -> Any:
        """Return the value of the first of these keys that says something; values of another type stay."""
        kind: Any = {type(None): object, int: (int, float), float: (int, float)}.get(
            type(default), type(default)
        )
        said = [key for key in keys if key in self._left and isinstance(self._left[key], kind)]
        values = [value for key in said if (value := self._left.pop(key)) not in _EMPTY]
        return values[0] if values else default

    def _comment(self, key: str, value: Any, reason: str) -> None:
        text = " ".join(as_written(value).split())
        text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
        self.comments.append(f"{key}: {text} — {reason}")

    def _set(self, target: str, value: Any, key: str, written: Any) -> None:
        if target not in self.values:
            self.values[target], self._origins[target] = value, (key, written)
        elif self.values[target] != value:
            self._comment(key, written, f"{target} is already {as_written(self.values[target])}")

    def _translate(self, key: str, value: Any) -> None:
        text, name = as_written(value), "optimizer" if key == "optim" else key
        exact, general = answers_to(name, text), meant(name, "answers")
        known = [] if general else [ours for ours in keys_of("train") if "." in ours]
        unsectioned = [ours for ours in known if name in (ours, ours.rpartition(".")[2])]
        targets = [_KEYS.get(target, target) for target in meant(name, "keys") or unsectioned]
        words = (text.lower(), *meant(text, "values"), [word.strip() for word in text.split(",")], [value])
        words = () if isinstance(value, dict) else words
        fitting = [(to, form) for to in targets for form in (value, *words) if fits(to, form)]
        reason = next(iter((*exact, *general)), "").replace("{value}", text)
        is_said = exact or value is True or "{value}" in "".join(general[:1])
        if fitting and not exact:
            self._set(*fitting[0], key, value)
        elif is_said and (written := self._written(reason)):
            for to, kept in written.items():
                self._set(to, kept, key, value)
        elif value is False and reason.startswith(("write ", "set ")):
            self._comment(key, value, "not needed: it is off")
        else:
            unfit = f"{targets[0]} cannot have this value" if targets else "no counterpart is known"
            self._comment(key, value, reason or unfit)

    @staticmethod
    def _written(answer: str) -> dict[str, Any]:
        """Return the keys that an answer says to write; none if it is no whole answer."""
        verb, _, rest = answer.partition(" ")
        if verb not in ("write", "set"):
            return {}
        overrides, unread = parse_overrides(shlex.split(rest.partition(";")[0]))
        written = {
            _KEYS.get(override.key_or_group, override.key_or_group): override.value()
            for override in overrides
        }
        is_whole = not unread and all(
            key in run_keys() and fits(key, value) for key, value in written.items()
        )
        return written if is_whole else {}

    def _data(self) -> None:
        train, tests = self._take("datasets", default=[]), self._take("test_datasets", default=[])
        splits = self._take("dataset_splits", default=["train"])
        if isinstance(mixture := self._take("dataset_mixture"), dict):
            train, self._left["val_size"] = mixture.get("datasets", []), mixture.get("test_split_size")
        for name, share in dict(self._take("dataset_mixer", default={})).items():
            train += [
                {"path": name, "split": split, "weight": share} for split in splits if "test" not in split
            ]
            tests += [{"path": name, "split": split} for split in splits if "test" in split]
        if name := self._take("dataset_name"):
            source = {"path": name, "name": self._take("dataset_config", "dataset_config_name")}
            train = [source | {"split": self._take("dataset_train_split", default="train")}]
            split = self._take("dataset_test_split", default="test")
            said = [self._left.get(key) for key in ("eval_strategy", "evaluation_strategy", "do_eval")]
            tests = [source | {"split": split} for when in said if when not in (None, False, "no")][:1]
        if self.trainer == "LLaMA-Factory":
            folder, limit = self._take("dataset_dir", default="data"), self._take("max_samples")
            train, tests = (
                [{"path": folder, "name": entry, "limit": limit} for entry in _listed(self._take(key))]
                for key in ("dataset", "eval_dataset")
            )
        for target, entries in (("data.train", train), ("data.eval", tests)):
            if entries:
                sources = [self._source(f"{target}[{at}]", entry) for at, entry in enumerate(entries)]
                self.values[target] = [source for some in sources for source in some]

    def _source(self, place: str, entry: Any) -> list[Any]:
        """Return an entry of `datasets` as sources, one for each file."""
        entry = dict(entry) if isinstance(entry, dict) else {"path": entry}
        entry = {"path": entry.get("id"), "name": entry.get("config")} | entry
        kind = entry.get("type") or {}
        if str(kind).startswith("passthrough"):
            self.values["data.template"] = "applied"
        elif isinstance(kind, str) and not kind.startswith("user_defined"):
            self.values["data.text_as_messages"] = True
        for option, value in (entry | (kind if isinstance(kind, dict) else {})).items():
            if option not in _OF_SOURCES and not option.startswith("field_") and value not in _EMPTY:
                self._comment(f"{place}.{option}", value, "formats are detected; for others docs/data.md")
        files = _listed(entry.get("data_files")) or [None]
        return [source for file in files for source in as_sources([entry | {"data_files": file}])]

    def _batch(self) -> None:
        default = 1 if self.trainer == "axolotl" else 8
        of_device = ("per_device_train_batch_size", "micro_batch_size", "gradient_accumulation_steps")
        given = [key for key in of_device if key in self._left]
        pairs = self._take(*of_device[:2], default=default)
        steps = self._take(of_device[2], default=1)
        if any(meant(key, "keys") == (_BATCH,) for key in self._left):
            self.comments += [f"{key} — not needed: micro-batches are as large as fits" for key in given]
        elif fits(_BATCH, pairs * steps):
            self.values[_BATCH] = pairs * steps
            gpus = f"times the number of GPUs there, which no file says: {8 * pairs * steps} for 8"
            self.batch = f"{_BATCH}: {pairs} pairs x {steps}, {gpus}."

    def _adapter(self) -> None:
        kind = self._take("finetuning_type", "adapter", "use_peft", "use_lora")
        if kind is None and self.trainer == "LLaMA-Factory":
            kind = "lora"
        if str(kind).lower() in ("lora", "qlora", "true"):
            ours = 8 if self.trainer == "LLaMA-Factory" else 16
            r = self._take("lora_rank", "lora_r", default=ours)
            alpha = self._take("lora_alpha", default=2 * r if ours == 8 else 32)
            self.values |= {"model.adapter.r": r, "model.adapter.alpha": alpha}
            if self.trainer == "TRL" and not self._left.get("lora_target_modules"):
                self.comments.append("lora_target_modules: here all linear layers; peft chooses few of them")
            return
        if str(kind).lower() not in ("none", "full", "false"):
            self._comment("adapter", kind, "not offered: all weights are trained, or a LoRA adapter")
        for key in [key for key in self._left if "".join(meant(key, "keys")).startswith("model.adapter.")]:
            self._comment(key, self._left.pop(key), "not needed: no adapter is trained")

    def _machine(self) -> None:
        half, brain = self._take("fp16"), self._take("bf16")
        if half is True or brain is not None:
            self.values["model.dtype"] = "fp16" if half is True else "bf16" if brain else "fp32"
        is_quantized = any(map(self._left.get, ("load_in_4bit", "load_in_8bit", "quantization_bit")))
        for key in ("deepspeed", "fsdp", "fsdp_config"):
            value = self._left.get(key)
            text = "stage3" if key == "fsdp_config" and value else str(value or "").replace("_", " ")
            text = text.replace("full shard", "stage3").replace("shard grad op", "stage2")
            if value and is_quantized:
                self._comment(key, self._left.pop(key), "a quantized base is whole on every GPU")
            elif stage := re.search(r"(?:z|zero|stage)\W{0,4}([0-3])", text):
                self._set("parallelism.kind", _STAGES[stage[1]], key, self._left.pop(key))
                if key == "deepspeed" and "offload" in text and stage[1] in "23":
                    self.values["parallelism.offload_optimizer"] = "cpu"
                    self.values |= {"parallelism.offload_parameters": "cpu"} if stage[1] == "3" else {}

    def _numbers(self) -> None:
        """Compute what several keys say together."""
        rate = self._left.get("learning_rate")
        if isinstance(rate, float) and (low := self._take("min_lr", default=0.0)):
            self.values["optim.min_lr_ratio"] = low / rate
        if {"adam_beta1", "adam_beta2"} & self._left.keys():
            defaults = {"adam_beta1": 0.9, "adam_beta2": 0.999}
            self.values["optim.betas"] = [self._take(key, default=beta) for key, beta in defaults.items()]
        if isinstance(kinds := self._left.get("loss_type"), list):
            weights = self._take("loss_weights", default=[1.0] * len(kinds))
            words = [
                [word for word in (kind, *meant(kind, "values")) if fits("loss.kind", word)] for kind in kinds
            ]
            if all(words) and len(words) == len(weights):
                terms = [
                    {"kind": fitting[0], "weight": weight}
                    for fitting, weight in zip(words, weights, strict=True)
                ]
                self._set("loss.terms", terms, "loss_type", self._left.pop("loss_type"))
        if "simpo" in self._left.values() and not {"simpo_gamma", "gamma"} & self._left.keys():
            given = map(self._left.get, ("beta", "pref_beta", "rl_beta"))
            beta = next((number for number in given if isinstance(number, int | float)), 0.1)
            self.values["loss.simpo_gamma"] = self._take("gamma_beta_ratio", default=0.5 / beta) * beta
            if self.trainer == "TRL" and (weight := self._take("cpo_alpha", default=1.0)):
                self._comment(
                    "cpo_alpha", weight, "TRL adds a log-likelihood to simpo with this weight (CPO-SimPO)"
                )

    def _combine(self) -> None:
        """Correct values that depend on others."""
        values = self.values
        if values.pop("model.attention", None):
            self._comment(*self._origins["model.attention"], "not needed: the fastest kernel is chosen")
        if values.get("optim.warmup_steps") == 0:  # there it means that the ratio counts
            del values["optim.warmup_steps"]
        if values.get("loss.kind") == "orpo" and "loss.beta" in values and "loss.orpo_lambda" not in values:
            values["loss.orpo_lambda"] = values.pop("loss.beta")
        if "loss.terms" in values and "loss.kind" in values:
            values["loss.terms"][0]["kind"] = values.pop("loss.kind")

    def _obey_rules(self) -> None:
        """Leave out what the rules between keys refuse, with their reason."""
        while True:
            config = resolve_reference(SCHEMA.validate_python(as_tree(self.values)))
            errors = [rule.error(config) for rule in RULES if rule.broken(config)]
            refused = {key: error.message for error in errors for key in error.where.split(", ")}
            ours = [key for key in (*self._origins, *self.defaults) if key in self.values]
            if not (wrong := [key for key in refused if key in ours]):
                return
            del self.values[key := wrong[0]]
            if key in self._origins:
                self._comment(*self._origins[key], refused[key])
            else:
                self.defaults.remove(key)


def _listed(value: Any) -> list[Any]:
    """Return a list, or the names in a text with commas."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value or [])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: sys.argv); return the exit code."""
    parser = Arguments(prog="dpo-dist convert", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="YAML or JSON of another trainer")
    parser.add_argument(
        "output", type=Path, metavar="OUTPUT", nargs="?", help="file to write; default: print it"
    )
    given = parser.parse_args(arguments)
    try:
        if (content := read_keys(given.file)).keys() <= run_keys().keys():
            remedy = f"dpo-dist train {shlex.quote(str(given.file))} --check"
            raise ConfigError("this is a file of dpo-dist", where=str(given.file), remedy=remedy)
        text = Conversion(content).yaml(given.file.name)
        if given.output is None:
            print_result(text)
            return ExitCode.completed
        if given.output.exists():
            raise ConfigError(
                "this file exists", where=str(given.output), remedy="remove it, or name another"
            )
        write_text(given.output, text)
        print_line(f"written: {given.output}; next: dpo-dist train {shlex.quote(str(given.output))} --check")
        return ExitCode.completed
    except FAILURES as error:
        raise composition_error(error, []) from error


if __name__ == "__main__":
    exit_after(main)
