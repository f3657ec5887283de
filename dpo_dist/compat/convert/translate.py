"""Translate another trainer's keys into keys of `train`, and name each key that is left out.

In names and comments "theirs" is the other trainer's, "ours" is dpo_dist's. Names of other trainers are in
compat/other_trainers.yaml (what a key or value means), trainers.yaml (defaults), and here, where keys depend
on each other.

The steps of `translate_run`, in their order, for `trl dpo --model_name_or_path m --dataset_name a.jsonl
--loss_type sigmoid sft --beta 0.2 --packing`; steps that find nothing to do are left out:

    step            takes from `left`          adds to `values`
    _method         rl, loss_type              loss.terms=[{kind: sigmoid, ...}, {kind: sft, ...}]
    set_sources     dataset_name               data.train=[{path: a.jsonl}]
    _batch          -                          trainer.global_batch_pairs=8: 8 pairs x 1 are the default there
    translate       model_name_or_path, beta   model.path=m, loss.beta=0.2
                    packing                    nothing; to `comments`: "packing: true, not needed: ..."
    _add_defaults   -                          trainer.epochs=3, optim.schedule=linear, ...
    _obey_rules     -                          removes a value that a rule refuses; `origins`, {loss.beta:
                                               (beta, 0.2), ...}, has their key for the comment
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dpo_dist.compat.convert.reading import ForeignRun
from dpo_dist.compat.other_trainers import (
    Answer,
    answer_on,
    as_sources,
    equivalents,
    find_answer,
    is_switch,
    names_of,
)
from dpo_dist.config.keys import verb_keys
from dpo_dist.config.rules import resolve_reference, rules_of
from dpo_dist.config.schema import SCHEMA, OptimConfig, TrackerName
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.fields import as_written, validated
from dpo_dist.foundation.files import own_table
from dpo_dist.foundation.text import without_secrets
from dpo_dist.foundation.types import as_tree
from dpo_dist.kit import LossKind, fits, kinds_using, parse_overrides, run_keys

_KINDS = ("ddp", "ddp", "zero2", "zero3")
"""The kind for each stage of ZeRO; here replicated weights are stage 1, which computes what 0 does."""
EMPTY: tuple[Any, ...] = (None, "", [], {})
_KEYS = {"loss": "loss.kind", "parallelism": "parallelism.kind", "reference": "reference.mode"}
_KEYS |= {"optim": "optim.kind", "tracking": "tracking.to"}
"""The key that the name of a preset sets; presets of losses set other keys too, as in their papers."""
_UNFOLDED = ("lr_scheduler_kwargs", "model_init_kwargs", "trl")
"""Their mappings whose keys have other names than all keys outside them."""
_LONGEST = 60
_TRAINERS = own_table(Path(__file__).with_name("trainers.yaml"))


class Translation:
    """A translation, which the steps of `translate_run` make: each takes keys and adds values."""

    def __init__(self, foreign: ForeignRun) -> None:
        self.trainer, keys, self.name = foreign
        self.facts = _TRAINERS[self.trainer]
        self.left: dict[str, Any] = dict(keys)
        """Their keys that no step has taken."""
        self.values: dict[str, Any] = {}
        """The values of our keys."""
        self.comments: list[str] = []
        """Lines on keys that are left out."""
        self.about: list[str] = []
        """Lines on the whole run."""
        self.origins: dict[str, tuple[str, Any]] = {}
        """For each of our keys: the key of theirs from which it comes, with its value there."""
        self.not_default: set[str] = set()
        """Our keys that must not get the other trainer's default."""
        if isinstance(keys.get("model"), str) and keys["model"]:
            self.left["model_name_or_path"] = self.take("model_name_or_path", "model")
        for name in _UNFOLDED:
            inner = keys.get(name)
            if isinstance(inner, dict):
                del self.left[name]
                self.unfold(name, inner)
        self.computed: set[str] = set()
        """Their keys whose values only a shell can compute."""
        for key, value in self.left.items():
            if re.search(r"\$[\w({]|^`", as_written(value)) and "template" not in key:
                self.computed.add(key)
        for key in sorted(self.computed):
            self.comment(key, self.left.pop(key), "the shell computes it: write the value")

    def take(self, *keys: str, default: Any = None) -> Any:
        """Remove and return the value of the first of these keys that has one of the default's type.

        A number is finite; none is a text or a boolean.
        """
        kind: Any = object if default is None else type(default)
        is_number = kind in (int, float)
        if is_number:
            kind = (int, float)
        first = ""
        value = default
        for key in keys:
            candidate = self.left.get(key)
            if candidate in EMPTY or not isinstance(candidate, kind):
                continue
            if is_number and finite_number(candidate) is None:
                continue
            if not first:
                first = key
                value = self.left.pop(key)
                continue
            other = self.left.pop(key)
            if other != value:
                self.comment(key, other, f"{first} overrides it")
        return value

    def unfold(self, name: str, inner: Mapping[str, Any]) -> None:
        """Put the keys of their mapping `name` beside the others, and name those that they override."""
        for key, value in inner.items():
            outer = self.left.get(key)
            if outer not in EMPTY and outer != value:
                self.comment(key, outer, f"{name}.{key} overrides it")
        self.left |= inner

    def comment(self, key: str, value: Any, reason: str) -> None:
        """Add a comment that says why a key of theirs is left out."""
        text = " ".join(as_written(value).split())
        if len(text) > _LONGEST:
            text = f"{text[:_LONGEST]}..."
        self.comments.append(f"{key}: {text} — {reason}")

    def set(self, target: str, value: Any, key: str, their_value: Any) -> None:
        """Set a key of ours from a key of theirs, if the value fits and ours is not set yet."""
        if target == "loss.terms" and isinstance(value, list):  # `[simpo, sft]` names kinds
            value = [{"kind": term} if isinstance(term, str) else term for term in value]
        if not fits(target, value):
            self.comment(key, their_value, f"{target} cannot have this value")
        elif target not in self.values:
            self.values[target] = value
            self.origins[target] = (key, their_value)
        elif self.values[target] != value:
            self.comment(key, their_value, f"{target} is already {as_written(self.values[target])}")

    def translate(self, key: str, value: Any) -> None:
        """Set our keys for a key of theirs, or comment why it is left out."""
        reason = self.facts.get("own", {}).get(key)
        if reason:
            self.comment(key, value, reason)
            return
        name = "optimizer" if key == "optim" else key  # our section `optim` is another thing
        meaning = _meaning_of(name, value)
        answer = meaning.answer
        targets = meaning.targets
        if meaning.fitting:  # learning_rate: 1e-6
            self.set(*meaning.fitting[0], key, value)
        elif meaning.overrides:  # use_dora: true, for which the answer writes model.adapter.variant=dora
            for target, our_value in meaning.overrides.items():
                self.set(target, our_value, key, value)
        elif answer and value is False and meaning.is_switch:  # load_in_8bit: false
            self.comment(key, value, "not needed: it is off")
        elif answer:  # neftune_noise_alpha: 5
            self.comment(key, value, answer.text)
        else:  # learning_rate: fast; or a name that nobody knows
            reason = f"{targets[0]} cannot have this value" if targets else "no counterpart is known"
            self.comment(key, value, reason)

    def as_file(self) -> str:
        """Return the content of a file for `train`, without secrets; comments name what is not translated."""
        lines = list(self.about)
        if self.comments:
            lines += ["Not translated:", *self.comments]
        comments = ""
        for line in lines:
            text = " ".join(line.split())
            comments += f"# {''.join(filter(str.isprintable, text))}\n"
        order = list(run_keys())
        keys = as_tree({key: self.values[key] for key in sorted(self.values, key=order.index)})
        return str(without_secrets(comments + yaml.safe_dump(keys, sort_keys=False, allow_unicode=True)))


class _Meaning(NamedTuple):
    """What a key of theirs with its value may mean.

    For `torch_dtype: bfloat16`, `targets`, our keys of the same meaning, are `model.dtype`, and `fitting`,
    those that can have the value, with it in our words, `(model.dtype, bf16)`. `answer`: what else is said on
    the name. `overrides`: our keys that it sets for this value. `is_switch`: nothing is to be done if false.
    """

    targets: list[str]
    fitting: list[tuple[str, Any]]
    answer: Answer | None
    overrides: dict[str, Any]
    is_switch: bool


def _meaning_of(name: str, value: Any) -> _Meaning:
    """Find what a name of theirs with this value may mean."""
    text = as_written(value)
    on_value = find_answer(name, text)
    on_name = answer_on(name, text)
    targets = list(equivalents(name, "keys"))
    if not targets and not on_name:
        for ours in verb_keys("train"):
            if "." in ours and name in (ours, ours.rpartition(".")[2]):  # `beta`: loss.beta
                targets.append(ours)
    targets = [_KEYS.get(target, target) for target in targets]
    if isinstance(value, list):
        forms = [value, *value[:1]]
    elif isinstance(value, dict):
        forms = [value]
    else:
        forms = [value, text.lower(), *equivalents(text, "values")]
        forms += [[word.strip() for word in text.split(",")], [value]]
    fitting = []
    if not on_value:  # an answer to this very value, `loss_type: bco_unpaired`, goes before a key that fits
        for target in targets:
            fitting += [(target, form) for form in forms if fits(target, form)]
    answer = on_value or on_name
    has_value = on_name != answer_on(name, "")  # the answer's words have the user's value
    is_certain = bool(on_value) or value is True or has_value
    overrides = _keys_of(answer.words) if answer and is_certain and not fitting else {}
    return _Meaning(targets, fitting, answer, overrides, is_switch(name))


def _keys_of(words: Sequence[str]) -> dict[str, Any]:
    """Return the keys that words set; none if one is unknown or does not fit."""
    overrides, unread = parse_overrides(words)
    if unread:
        return {}
    keys = {}
    for override in overrides:
        key = _KEYS.get(override.key_or_group, override.key_or_group)
        value = override.value()
        if key not in run_keys() or not fits(key, value):
            return {}
        keys[key] = value
    return keys


def as_list(value: Any) -> list[Any]:
    """Return a list as it is, the values of a mapping, or the names in a text with commas."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    if isinstance(value, dict):
        value = list(value.values())
    values = value if isinstance(value, list) else [value]
    return [entry for entry in values if entry is not None]


def finite_number(value: Any) -> float | None:
    """Return a finite number, also if it is written as text; None for anything else."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


_SOURCE_KEYS = (
    "path",
    "id",
    "name",
    "config",
    "split",
    "revision",
    "data_dir",
    "data_files",
    "weight",
    "limit",
    "type",
    "ds_type",
)
_FORMATS = ("prompt_format", "chosen_format", "rejected_format", "completion_format")


def set_sources(run: Translation) -> None:
    """Set `data.train` and `data.eval`."""
    for target, entries in zip(("data.train", "data.eval"), _entries(run), strict=True):
        sources = []
        for at, entry in enumerate(entries):
            sources += _source(run, f"{target}[{at}]", entry)
        if sources:
            run.set(target, sources, target, entries)


def _entries(run: Translation) -> tuple[list[Any], list[Any]]:
    """Return the datasets for training and for evaluation, in the form of TRL and axolotl."""
    if run.trainer == "LLaMA-Factory":
        source = {"path": run.take("dataset_dir", default="data"), "limit": run.take("max_samples")}
        train = [{**source, "name": name} for name in as_list(run.take("dataset"))]
        tests = [{**source, "name": name} for name in as_list(run.take("eval_dataset"))]
        return train, tests
    train = run.take("datasets", default=[])
    tests = run.take("test_datasets", default=[])
    mixture = run.take("dataset_mixture")
    if isinstance(mixture, dict):
        if train:
            run.comment("datasets", train, "dataset_mixture overrides it")
        train = as_list(mixture.get("datasets"))
        inner = {key: value for key, value in mixture.items() if key not in ("datasets", "seed")}
        run.unfold("dataset_mixture", inner)
    splits = as_list(run.take("dataset_splits")) or ["train"]
    for name, amount in _mixture(run):
        for split in map(str, splits):
            if "test" in split:
                tests.append({"path": name, "split": split})
            else:
                train.append({"path": name, "split": split, **amount})
    name = run.take("dataset_name")
    if name and train:
        run.comment("dataset_name", name, "the list of datasets overrides it")
    elif name:
        source = {"path": name, "name": run.take("dataset_config", "dataset_config_name")}
        train = [{**source, "split": run.take("dataset_train_split", default="train")}]
        split = run.take("dataset_test_split", default="test")
        strategies = [run.left.get(key) for key in ("eval_strategy", "evaluation_strategy", "do_eval")]
        evaluates = any(strategy not in (None, False, "no") for strategy in strategies)
        tests = [{**source, "split": split}] if evaluates else []
    return train, tests


def _mixture(run: Translation) -> list[tuple[str, dict[str, Any]]]:
    """Return the sources of a mixture, and the limit or weight of each."""
    sources = []
    for name, value in run.take("dataset_mixer", default={}).items():
        amount = finite_number(value) or 0
        if amount <= 0:
            run.comment(f"dataset_mixer.{name}", value, "neither a share nor a number of records")
        elif amount <= 1:
            sources.append((name, {"weight": amount}))
        else:
            sources.append((name, {"limit": math.ceil(amount)}))
    return sources


def _source(run: Translation, place: str, entry: Any) -> list[Any]:
    """Return an entry of `datasets` as sources, one per file."""
    entry = dict(entry) if isinstance(entry, Mapping) else {"path": entry}
    entry = {"path": entry.get("id"), "name": entry.get("config"), **entry}
    kind = entry.get("type") or {}
    if str(kind).startswith("passthrough"):
        run.values["data.template"] = "applied"
    elif isinstance(kind, str) and not kind.startswith("user_defined"):
        run.values["data.text_as_messages"] = True
    options = {**entry, **kind} if isinstance(kind, dict) else entry
    for option, value in options.items():
        if option in _FORMATS:
            if value not in (f"{{{option.removesuffix('_format')}}}", None, ""):
                run.comment(
                    f"{place}.{option}",
                    value,
                    "texts are read without it: write reader: module:function at the source, or "
                    "data.text_as_messages=true data.chat_template=FILE (docs/data.md)",
                )
        elif option not in _SOURCE_KEYS and not option.startswith("field_") and value not in EMPTY:
            run.comment(f"{place}.{option}", value, "formats are detected; for others docs/data.md")
    sources = []
    for file in as_list(entry.get("data_files")) or [None]:
        sources += as_sources([{**entry, "data_files": file}])
    return sources


# For each method the losses that it can have; none: any. The first loss of a sum is the method's.
_METHODS: dict[str, tuple[str, ...]] = {
    "dpo": (),
    "ipo": ("ipo",),
    "kto": ("kto", "apo_zero_unpaired"),
    "orpo": ("orpo",),
    "cpo": ("cpo", "simpo"),
    "simpo": ("simpo",),
    "sft": ("sft",),
}
# Options that change the loss, by the beginnings of their names, and the only methods that read them.
_READ_BY = {
    ("kto_",): ("kto",),
    ("dpo_loss", "dpo_norm_loss", "pref_loss", "rpo_alpha"): ("dpo", "ipo"),
    ("pref_ftx",): ("dpo", "kto"),
}
_STAGES = {"shard grad op": "stage2", "full shard|fsdp": "stage3", "(multi|single) gpu|ddp": "stage0"}
_DEVICE_BATCH_KEYS = ("per_device_train_batch_size", "micro_batch_size", "gradient_accumulation_steps")
_SHARDING = ("deepspeed", "zero_stage", "accelerate_config", "fsdp", "fsdp_config", "fsdp_shard_degree")
_QUANTIZED = ("load_in_4bit", "load_in_8bit", "use_qlora", "quantization_bit", "quant_bits")
_WARMUP = ("warmup_steps", "warmup_ratio")
# Both parts are frozen by default.
_FROZEN_TOWER = ("freeze_vision_tower", "freeze_vit")
_FROZEN_PROJECTOR = ("freeze_multi_modal_projector", "freeze_aligner")
_BATCH = "trainer.global_batch_pairs"
_LENGTH = "data.max_length"
_ODDS_WEIGHT = "loss.options.odds_weight"
_WHOLE_SCORES = {"apo_down", "apo_zero", "bco_pair", "nca_pair", "sppo_hard"}
_SCORES = {"discopop", "exo_pair", "hinge", "ipo", "robust", "sigmoid", "sigmoid_norm"}
_SORTED = {"aot", "aot_unpaired"}
# Options of TRL 1.16's DPOConfig: the key here, the value without an effect, the losses that the option
# changes there, and those with which TRL refuses it. With any other loss TRL ignores it (`_compute_loss`).
_LOSS_OPTIONS: dict[str, tuple[str, Any, set[str], set[str]]] = {
    "f_divergence_type": ("divergence", "reverse_kl", _SCORES, _WHOLE_SCORES | _SORTED),
    "use_weighting": ("weighting", False, _SCORES | _WHOLE_SCORES | {"sft"}, _SORTED),
    "ld_alpha": ("ld_alpha", None, _SCORES | _WHOLE_SCORES | _SORTED, set()),
    "label_smoothing": ("label_smoothing", 0.0, {"exo_pair", "robust"} | _SORTED, set()),
    "discopop_tau": ("options.tau", 0.05, {"discopop"}, set()),
}
# Arguments that TRL reads only if another one has this value.
_ONLY_WITH = {
    "ref_model_mixup_alpha": ("sync_ref_model", True),
    "ref_model_sync_steps": ("sync_ref_model", True),
    "f_alpha_divergence_coef": ("f_divergence_type", "alpha_divergence"),
}


def translate_run(foreign: ForeignRun) -> Translation:
    """Return the translation of a run."""
    run = Translation(foreign)
    # Takes the keys of method and loss, and SimPO's. Leaves `rl` and one `loss_type` to `translate`.
    method = _method(run)
    run.about = [f"From {run.name}, read as a run of {run.trainer} that trains by {method}."]
    if run.trainer == "TRL":
        # Takes options without an effect on the run's losses, which `_method` has left or set.
        _loss_options_of_trl(run)
    # Takes all keys of datasets; puts those inside of a mixture among the others.
    set_sources(run)
    # Takes the keys of batches and the number of processes.
    run.about += _batch(run)
    # Takes the keys of the kind of tuning; leaves those of an adapter.
    has_adapter = _trains_adapter(run)
    # Each takes keys of its own that mean something together; none reads what another one sets.
    for part in (_targets, _machine, _images, _numbers, _watching):
        part(run)
    # The first value of a key wins: `save_strategy: no` over `save_steps`, the loss over the method.
    for key in sorted(run.left, key=lambda name: (name == "rl", not name.endswith("strategy"))):
        if run.left[key] not in EMPTY:
            run.translate(key, run.left[key])
    # From here on the keys are translated, and steps read `values`. Removes what an adapter does not need,
    # and sets its rank: the defaults depend on whether there is an adapter.
    _set_adapter(run, has_adapter)
    # Puts the loss into a sum of losses, and needs both: an option belongs to a term, a default to no sum.
    _combine(run)
    empty = [key for key, value in run.left.items() if value in EMPTY]
    if empty:
        run.comments.append(f"{', '.join(empty)}: empty")
    # Sets what the run does not: needs all that it does.
    defaults = _add_defaults(run, "max_length" in empty)
    # Takes loss options: needs the loss, which may be a default.
    _give_options(run)
    # Removes values that contradict each other: needs all of them in their place.
    _obey_rules(run, defaults)
    # Reads the loss that is left.
    _check_loss(run, method)
    if defaults:
        run.about.append(f"Not in it, so its defaults: {', '.join(defaults)}.")
    return run


def _method(run: Translation) -> str:
    """Return the training method; set its loss, or a weighted sum of losses."""
    method = str(run.take("rlhf_type", "rl", "stage", default=run.facts["method"])).lower()
    # These keys ask for a classification or reward head in place of the LM head.
    for key in ("task_type", "reward_model", "process_reward_model"):
        task = run.take(key)
        if task not in (None, False, "causal_lm"):
            method = f"{key}: {as_written(task)}"
    if method not in _METHODS:
        raise ConfigError(
            f"this run of {run.trainer} trains by a method that is not translated",
            got=method,
            expected=", ".join(_METHODS),
            remedy=f"train it with {run.trainer}: dpo-dist has no pretraining or online RL; write a reward "
            "model as a run with loss=reward, a distillation with loss=distill",
        )
    for names, readers in _READ_BY.items():
        for key, value in list(run.left.items()):
            if key.startswith(names) and method not in readers and value not in EMPTY:
                why = f"not needed: there, it is read only with {' or '.join(readers)}"
                run.comment(key, value, why)
                del run.left[key]
    kinds = run.take(*names_of("loss"))
    if method == "cpo" and kinds == "sigmoid":  # there the name of CPO's own loss
        kinds = None
    weights = as_list(run.take("loss_weights", "dpo_loss_weights"))
    kinds = as_list(kinds) or ["sigmoid"] * bool(weights)  # the default of each trainer that has weights
    our_kinds = []
    for kind in kinds:
        words = (kind, *equivalents(str(kind), "values"))
        our_kinds.append(next((word for word in words if fits("loss.kind", word)), None))
    answer = find_answer("loss_type", as_written(kinds[0])) if len(kinds) == 1 else None
    if None in our_kinds and not (answer and answer.words):
        remedy = f"train it with {run.trainer}, or write the loss as a function: docs/python.md"
        got = as_written(kinds[our_kinds.index(None)])
        remedy = answer.text if answer else remedy
        raise ConfigError("dpo-dist does not have this loss", got=got, remedy=remedy)
    if len(kinds) > 1 or weights:
        weights = weights or [1.0] * len(kinds)
        if method != "dpo" or len(weights) != len(kinds):  # these trainers refuse it, too
            raise ConfigError(
                f"this run of {run.trainer} names a sum of losses that it cannot train",
                where="loss_type, loss_weights",
                got=f"{as_written(kinds)}, {as_written(weights)}, by {method}",
                expected="a weight for each loss, and the method dpo",
                remedy="write the loss that was trained, and convert again",
            )
        terms = [{"kind": kind, "weight": weight} for kind, weight in zip(our_kinds, weights, strict=True)]
        run.set("loss.terms", terms, "loss_type", kinds)
    elif kinds:
        run.left["loss_type"] = kinds[0]
    if method != "dpo":
        run.left["rl"] = method
    if "simpo" in (method, *kinds):
        _simpo(run)
    return method


def _loss_options_of_trl(run: Translation) -> None:
    """Leave out options that TRL does not use with the run's losses, or uses in another way than `train`."""
    terms = run.values.get("loss.terms", [{"kind": run.left.get("loss_type", "sigmoid")}])
    kinds = {str(term["kind"]) for term in terms}
    are_all_in_table = kinds <= _SCORES | _WHOLE_SCORES | _SORTED | {"sft"}
    for option, (key, neutral, changed, refused) in _LOSS_OPTIONS.items():
        if not are_all_in_table or run.left.get(option, neutral) == neutral:
            continue
        here = kinds.intersection(kinds_using(key))
        there = kinds & changed
        if kinds & refused:
            reason = f"TRL refuses it with {', '.join(sorted(kinds & refused))}"
        elif not there:
            reason = f"TRL does not use it with {', '.join(sorted(kinds))}"
            if here:
                reason += f"; loss.{key} would change it here"
        elif here != there:
            reason = f"here it changes {', '.join(sorted(here)) or 'nothing'}; TRL and dpo-dist differ in "
            reason += ", ".join(sorted(here ^ there))
        else:
            continue
        run.comment(option, run.left.pop(option), reason)
    for option, (other, value) in _ONLY_WITH.items():
        if option in run.left and run.left.get(other) != value:
            why = f"not needed: TRL reads it only with {other}: {value}"
            run.comment(option, run.left.pop(option), why)


def _simpo(run: Translation) -> None:
    beta, gamma, likelihood = run.facts["simpo"]
    beta = run.take("beta", *names_of("loss.beta"), default=beta)
    ratio = run.take("gamma_beta_ratio", "dpo_gamma_beta_ratio", default=0.3 if gamma is None else -1.0)
    gamma = ratio * beta if ratio >= 0 else run.take("simpo_gamma", "gamma", default=gamma)
    run.set("loss.beta", beta, "beta", beta)
    run.set("loss.options.gamma", gamma, "simpo_gamma", gamma)
    # A TRL run that sets gamma / beta is one of SimPO's own trainer, whose loss has no likelihood term.
    has_likelihood = ratio < 0 or run.trainer != "TRL"
    if not has_likelihood:
        likelihood = 0
    weight = run.take("cpo_alpha", default=likelihood)
    if weight:
        run.left.pop("rl", None)
        run.left.pop("loss_type", None)
        terms = [{"kind": "simpo", "weight": 1.0}, {"kind": "sft", "weight": weight}]
        run.set("loss.terms", terms, "cpo_alpha", weight)


def _batch(run: Translation) -> list[str]:
    """Set the pairs of a step; return a line that explains their number."""
    processes = run.take("num_processes", default=0)
    world = processes or 1
    if any(equivalents(key, "keys") == (_BATCH,) for key in run.left):
        for key in _DEVICE_BATCH_KEYS:
            if run.left.pop(key, None):
                run.comments.append(f"{key} — not needed: micro-batches are as large as memory allows")
        return []
    pairs, steps = run.facts["batch"]
    pairs = run.take(*_DEVICE_BATCH_KEYS[:2], default=pairs)
    steps = run.take(_DEVICE_BATCH_KEYS[2], default=steps or 0)
    if run.computed.union(run.left) & set(_DEVICE_BATCH_KEYS):  # the value of one of them is not known
        return []
    derives_steps = not steps
    if derives_steps:
        steps = math.ceil(16 / pairs / world) if fits(_BATCH, pairs * world) else 1
    total = pairs * steps * world
    run.set(_BATCH, total, "batch", [pairs, steps])
    gpus = f" x {world} processes"
    if not processes and derives_steps and steps > 1:
        gpus = f": {total}, or a little more, on any number of GPUs up to {steps}"
    elif not processes:
        gpus = f"; multiply it by the number of GPUs there, which is not given: {8 * total} for 8 GPUs"
    return [f"{_BATCH}: {pairs} pairs x {steps}{gpus}."] if _BATCH in run.values else []


def _trains_adapter(run: Translation) -> bool:
    """Return whether the run trains an adapter rather than all weights."""
    if run.left.get("ref_adapters") not in EMPTY and run.left["ref_adapters"] == run.left.get("adapters"):
        why = "not needed: it is the reference anyway"
        run.comment("ref_adapters", run.left.pop("ref_adapters"), why)
        run.not_default.add("reference.path")
    kind = run.take("tuner_type", "train_type", "finetuning_type", "adapter", "use_peft", "use_lora")
    if kind is None:
        kind = run.facts.get("tuner")
    kind = str(kind).lower()
    if kind not in ("lora", "qlora", "true", "none", "full", "false"):
        raise ConfigError(
            f"this run of {run.trainer} trains another kind of adapter, or a part of the weights",
            got=kind,
            expected="lora, qlora or full",
            remedy="choose one of these there, with a learning rate that suits it, and convert again",
        )
    if run.left.get("create_new_adapter") is True:
        raise ConfigError(
            f"this run of {run.trainer} trains a new adapter on top of the one that it names",
            where="create_new_adapter",
            remedy="merge the named adapter into its base there, and convert a file that names the result",
        )
    has_adapter = kind in ("lora", "qlora", "true")
    if has_adapter and run.left.get("sync_ref_model") is True:
        raise ConfigError(
            f"{run.trainer} refuses this run: with an adapter there is no reference that follows the policy",
            where="sync_ref_model",
            remedy="leave out sync_ref_model there, or the adapter, and convert again",
        )
    return has_adapter


def _targets(run: Translation) -> None:
    """Name an adapter's linear layers and stacked experts in one list."""
    experts = as_list(run.take("lora_target_parameters", "target_parameters"))
    if experts:
        layers = as_list(run.take("lora_target_modules", "target_modules"))
        if run.take("lora_target_linear", default=False):
            layers = ["all-linear"]
        run.set("model.adapter.target_modules", [*layers, *experts], "lora_target_parameters", experts)


def _set_adapter(run: Translation, is_trained: bool) -> None:
    """Set an adapter's rank and alpha; leave them out if an adapter is continued, or none is trained."""
    values = run.values
    unread = "no adapter is trained"
    adapter_keys = [key for key in values if key.startswith("model.adapter.")]
    if is_trained and "model.adapter.path" not in values:
        usual_r, alpha = run.facts["adapter"]
        r = values.get("model.adapter.r") or usual_r
        values["model.adapter.r"] = r
        values.setdefault("model.adapter.alpha", alpha or 2 * r)
        is_said = "model.adapter.target_modules" in values or run.left.get("lora_target_linear")
        if run.trainer in ("TRL", "axolotl") and not is_said:
            run.comments.append("lora_target_modules: here all linear layers; peft chooses only a few")
        return
    if is_trained:
        unread = "the adapter that is continued has its own value"
        adapter_keys.remove("model.adapter.path")
    for key in adapter_keys:
        del values[key]
        run.comment(*run.origins[key], f"not needed: {unread}")


def _machine(run: Translation) -> None:
    """Set the precision, and how weights are sharded."""
    fp16 = run.take("fp16")
    bf16 = run.take("bf16")
    if fp16 is True:
        run.values["model.dtype"] = "fp16"
    elif bf16 is not None:
        run.values["model.dtype"] = "bf16" if bf16 else "fp32"
    is_quantized = any(map(run.left.get, _QUANTIZED))
    for key in _SHARDING:
        value = run.left.get(key)
        if value in (*EMPTY, False):
            continue
        if is_quantized:
            run.comment(key, run.left.pop(key), "a quantized base is not sharded")
            continue
        run.not_default.add("parallelism.kind")
        # Of a mapping only the key's name is read: DeepSpeed's mapping has keys of other stages, too.
        text = key if isinstance(value, dict) else f"{key} {value}".removeprefix("fsdp ")
        text = text.replace("_", " ").replace("no offload", "")
        for words, stage in _STAGES.items():
            text = re.sub(words, stage, text)
        match = re.search(r"(?:\bz|zero|stage)\W{0,4}([0-3])", text)
        if match is None:
            continue
        number = int(match[1])
        run.set("parallelism.kind", _KINDS[number], key, run.left.pop(key))
        if "offload" in text and number >= 2:
            run.set("parallelism.offload_optimizer", "cpu", key, value)
        if "offload" in text and number == 3:
            run.set("parallelism.offload_parameters", "cpu", key, value)


def _images(run: Translation) -> None:
    """Set which parts for images are trained; here the projector is trained with the tower."""
    parts = {"tower": run.take(*_FROZEN_TOWER), "projector": run.take(*_FROZEN_PROJECTOR)}
    if parts == {"tower": None, "projector": None}:
        return
    trained_part = next((part for part, is_frozen in parts.items() if is_frozen is False), "none")
    run.set("model.images.train", trained_part, "frozen parts for images", parts)
    if trained_part == "tower" and parts["projector"] is not False:
        run.comment("frozen parts for images", parts, "here the projector is trained with the tower")


def _numbers(run: Translation) -> None:
    """Set our keys that depend on several of theirs."""
    rate = finite_number(run.left.get("learning_rate"))
    low = run.take("min_lr", default=0.0) if rate else 0.0
    if rate and low:
        run.set("optim.min_lr_ratio", low / rate, "min_lr", low)
    if {"adam_beta1", "adam_beta2"} & run.left.keys():
        first, second = run.facts["defaults"].get("optim.betas", [0.9, 0.999])
        betas = [run.take("adam_beta1", default=first), run.take("adam_beta2", default=second)]
        run.set("optim.betas", betas, "adam_beta1, adam_beta2", betas)
    if run.left.get("max_grad_norm", 1.0) is None and run.trainer != "axolotl":  # which leaves out such keys
        run.set("optim.max_grad_norm", run.left.pop("max_grad_norm"), "max_grad_norm", None)
    scheduler = run.left.get("lr_scheduler_type", run.left.get("lr_scheduler"))
    if scheduler == "warmup_stable_decay":
        _decay(run)
    elif scheduler == "constant":
        run.values["optim.warmup_ratio"] = 0.0
        for key in filter(run.left.__contains__, _WARMUP):
            why = "not needed: there, `constant` has no warm-up"
            run.comment(key, run.left.pop(key), why)
    if run.left.get("sync_ref_model") is True:
        steps = run.take("ref_model_sync_steps", default=0)
        if steps:
            run.take("sync_ref_model")
            run.set("reference.mode", "live", "sync_ref_model", True)
            run.set("loss.sync_reference.every", steps, "ref_model_sync_steps", steps)


def _decay(run: Translation) -> None:
    """Set the share of the steps in which the learning rate decays."""
    steps = finite_number(run.left.get("max_steps")) or 0
    share = 0.0
    if "num_decay_steps" not in run.left and run.trainer == "LLaMA-Factory":
        share = (1 - (finite_number(run.left.get("warmup_ratio")) or 0)) * 2 / 3
    elif steps > 0:
        share = run.take("num_decay_steps", default=0) / steps
    if share:
        run.set("optim.decay_ratio", share, "num_decay_steps", share)
    kind = run.take("decay_type", default="cosine")
    if kind != "linear":
        run.comment("decay_type", kind, "here the learning rate decays linearly")
    if run.left.get("min_lr_ratio") and any(map(run.left.get, _WARMUP)):
        reason = "there the warm-up begins at this share, here at 0: leave one of both out"
        run.comment("min_lr_ratio", run.left.pop("min_lr_ratio"), reason)


def _watching(run: Translation) -> None:
    """Set where metrics go, which checkpoint is kept, and whether a run ends early."""
    report = [str(name).lower() for name in as_list(run.take("report_to"))]
    report += [name for name in (*TrackerName, "comet") if run.take(f"use_{name}", default=False)]
    is_named = run.trainer == "axolotl" and bool(run.left.get("wandb_project"))
    is_online = run.left.get("wandb_mode", "disabled") != "disabled"
    if run.take("with_tracking", default=False) or is_named or is_online:
        report.append("wandb")
    ours: dict[str, TrackerName] = {name: name for name in TrackerName}
    ours |= {"all": TrackerName.wandb, "comet": TrackerName.comet_ml}
    if report:
        trackers = dict.fromkeys(ours[name].value for name in report if name in ours)
        run.set("tracking.to", list(trackers), "report_to", report)
    others = [name for name in report if name not in (*ours, "none")]
    if others:
        run.comment("report_to", others, f"the trackers of tracking.to are {', '.join(TrackerName)}")
    patience = run.take("early_stopping_patience", "early_stopping_steps", "early_stop_interval", default=0)
    metric = run.take("metric_for_best_model", default="")
    is_best = run.take("load_best_model_at_end", default=False)
    if is_best or metric or patience:
        best = f"eval_{(metric or 'loss').removeprefix('eval_')}"
        run.set("trainer.keep_best", best, "metric_for_best_model", metric)
    if is_best:
        run.set("trainer.final", "best", "load_best_model_at_end", is_best)
    if patience:
        run.set("trainer.patience", patience, "early_stopping_patience", patience)


def _combine(run: Translation) -> None:
    """Correct values that depend on other values."""
    values = run.values
    if values.pop("model.attention", None):
        why = "not needed: the fastest kernel is chosen"
        run.comment(*run.origins["model.attention"], why)
    if values.get("optim.warmup_steps") == 0:  # the other trainers then use the ratio
        del values["optim.warmup_steps"]
    if values.get("loss.kind") == "orpo" and "loss.beta" in values and _ODDS_WEIGHT not in values:
        values[_ODDS_WEIGHT] = values.pop("loss.beta")
    if values.get("loss.terms") and "loss.kind" in values:
        values["loss.terms"][0]["kind"] = values.pop("loss.kind")
    if "trainer.keep_best" in values and not values.get("trainer.eval_every"):
        every = values.get("trainer.save_every") or 100
        values["trainer.eval_every"] = every
        run.origins["trainer.eval_every"] = ("trainer.eval_every", every)
        run.comments.append(f"trainer.eval_every: {every}, because trainer.keep_best needs evaluations")


def _add_defaults(run: Translation, is_uncut: bool) -> list[str]:
    """Set the other trainer's defaults where ours differ; return their keys."""
    defaults = {**run.facts["defaults"], "parallelism.kind": "ddp", "tracking.to": []}
    if not any(key.startswith("model.adapter.") for key in run.values):
        defaults |= run.facts.get("full", {})
    if "model.adapter.path" in run.values and run.trainer in ("LLaMA-Factory", "ms-swift"):
        # These trainers' reference is the base; dpo_dist's default would be the base with the loaded adapter.
        defaults["reference.path"] = run.values.get("model.path")
        if run.values.get("model.quantization"):
            defaults["reference.quantization"] = run.values["model.quantization"]
    if is_uncut or _LENGTH not in {**defaults, **run.values}:
        run.not_default.add(_LENGTH)
        reason = "there no text is cut; here data.truncation cuts those above data.max_length: raise it"
        run.comment("max_length", None, reason)
    if run.values.get("loss.terms"):
        run.not_default.add("loss.kind")
    keys = [key for key in defaults if key not in run.values and key not in run.not_default]
    values = run.values
    values |= {key: defaults[key] for key in keys}
    if values.get("optim.warmup_steps", values.get("optim.warmup_ratio", OptimConfig.warmup_ratio)):
        values["optim.warmup_from_zero"] = True  # the warm-up of transformers, which all these trainers use
    return keys


def _give_options(run: Translation) -> None:
    """Move loss options into the terms that use them; leave out options that the loss does not use."""
    values = run.values
    terms = run.values.get("loss.terms", [])
    for key in [key for key in values if key.startswith("loss.options.")]:
        users = kinds_using(key.removeprefix("loss."))
        name = key.rpartition(".")[2]
        if not terms and values.get("loss.kind", LossKind.sigmoid) in users:
            continue
        value = values.pop(key)
        terms_of_users = [term for term in terms if term["kind"] in users]
        for term in terms_of_users:
            term["options"] = {**term.get("options", {}), name: value}
        if not terms_of_users:
            run.comment(*run.origins[key], f"{key} has no effect with this loss")


def _obey_rules(run: Translation, defaults: list[str]) -> None:
    """Leave out keys whose combination a rule of `train` refuses; a comment gives the rule's reason."""
    while True:
        config = resolve_reference(validated(SCHEMA, as_tree(run.values)))
        reasons = dict[str, str]()
        for rule in rules_of("train"):
            if rule.is_broken(config):
                message = rule.error(config).message
                for key in rule.keys(config):
                    reasons[key] = message
        ours = [key for key in (*run.origins, *defaults) if key in run.values]
        wrong = [key for key in reasons if key in ours]
        if not wrong:
            return
        key = wrong[0]
        value = run.values.pop(key)
        if key == "loss.terms":  # without the sum its first loss is left, which is the run's own
            first = value[0]
            run.values["loss.kind"] = first["kind"]
            for name, option in first.get("options", {}).items():
                run.values[f"loss.options.{name}"] = option
        if key in run.origins:
            run.comment(*run.origins[key], reasons[key])
        else:
            defaults.remove(key)


def _check_loss(run: Translation, method: str) -> None:
    """Raise if the loss is not one of the method's: keys of the run contradict each other."""
    terms = run.values.get("loss.terms") or [{"kind": run.values.get("loss.kind", LossKind.sigmoid)}]
    expected = _METHODS[method]
    kind = str(terms[0]["kind"])
    if expected and kind not in expected:
        raise ConfigError(
            f"this run of {run.trainer} trains by {method}, and its keys name another loss",
            got=kind,
            expected=" or ".join(expected),
            remedy=f"leave one of both out; where {run.trainer} has this loss for {method}, train it there",
        )
