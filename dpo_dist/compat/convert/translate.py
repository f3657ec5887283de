"""Apply the table of other trainers' names to a file of their keys, and name each key that is left out."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from dpo_dist.compat.other_trainers import (
    Answer,
    answer_on,
    as_sources,
    equivalents,
    find_answer,
    is_foreign,
    is_switch,
)
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.fields import as_written, choices
from dpo_dist.foundation.text import HIDDEN, without_secrets
from dpo_dist.foundation.types import as_tree
from dpo_dist.kit import fits, parse_overrides, run_keys, verb_keys

_EMPTY: tuple[Any, ...] = (None, "", [], {})
_KEYS = {"loss": "loss.kind", "parallelism": "parallelism.kind", "reference": "reference.mode"}
_KEYS |= {"optim": "optim.kind", "tracking": "tracking.to"}
"""The key that the name of a preset sets; presets of losses set other keys too, as in their papers."""
_LONGEST = 60
_SECRET = re.compile(
    r"(?i).*((api|access|auth|private|secret|hub|hf|wandb)_?key|secrets?|passw\w*|credentials?|webhook\w*)"
    r"|(?!(pad|eos|bos|unk|stop)_).*token"
)
"""Names of keys whose values are secret."""
_DEFAULTS = (
    "Keys that the other file does not have are dpo_dist's defaults here, not that trainer's: compare "
    "learning rate, schedule, warm-up, epochs, batch and lengths."
)
_ADAPTER = {"finetuning_type", "adapter", "tuner_type", "train_type", "use_peft", "use_lora"}
"""Keys that say whether an adapter is trained, by `lora`, `qlora` or true."""
_USUAL_RANK = 16


class Translation(NamedTuple):
    """The values of our keys, and for each key of theirs that is left out why."""

    values: dict[str, Any]
    left_out: list[str]

    def as_file(self) -> str:
        """Return the content of a file for `train`, without secrets; comments name what is not translated."""
        lines = [_DEFAULTS]
        if self.left_out:
            lines += ["Not translated:", *self.left_out]
        comments = ""
        for line in lines:
            text = " ".join(line.split())
            comments += f"# {''.join(filter(str.isprintable, text))}\n"
        order = list(run_keys())
        keys = as_tree({key: self.values[key] for key in sorted(self.values, key=order.index)})
        return str(without_secrets(comments + yaml.safe_dump(keys, sort_keys=False, allow_unicode=True)))


def translate(keys: Mapping[str, Any]) -> Translation:
    """Translate the keys of another trainer's file; a mapping's keys count as those beside it."""
    translation = Translation({}, [])
    origins = dict[str, str]()
    for name, value in _flat(_with_terms(_with_entries(keys))):
        _check_method(name, value)
        meaning = _meaning_of("optimizer" if name == "optim" else name, value)  # our section is another thing
        ours = dict(meaning.fitting[:1]) or meaning.overrides
        reason = meaning.reason(value)
        for key, our_value in ours.items():
            if key in translation.values and translation.values[key] != our_value:
                reason = f"{origins[key]} has set {key} to {as_written(translation.values[key])}"
                ours = {}
        if ours:
            translation.values.update(ours)
            origins |= dict.fromkeys(ours, name)
        else:
            text = HIDDEN if _SECRET.fullmatch(name) else " ".join(as_written(value).split())
            if len(text) > _LONGEST:
                text = f"{text[:_LONGEST]}..."
            translation.left_out.append(f"{name}: {text} — {reason}")
    terms = translation.values.get("loss.terms")
    if terms and "loss.kind" in translation.values:  # the sum names the kind of its first term
        terms[0]["kind"] = translation.values.pop("loss.kind")
    _set_adapter(keys, translation)
    return translation


def _check_method(name: str, value: Any) -> None:
    """Raise if a key names another way of training."""
    text = as_written(value)
    answer = find_answer(name, text)
    if answer and not answer.words and answer.text in equivalents(text, "methods"):
        raise ConfigError(
            "this run trains by a method that is not translated", where=name, got=text, remedy=answer.text
        )


def _set_adapter(keys: Mapping[str, Any], translation: Translation) -> None:
    """Give an adapter without a rank one, and leave out the keys of an adapter that is not trained."""
    values = translation.values
    said = {as_written(value).lower() for name, value in keys.items() if name in _ADAPTER}
    of_adapter = [key for key in values if key.startswith("model.adapter.")]
    if said & {"lora", "qlora", "true"} and not of_adapter:
        values["model.adapter.r"] = _USUAL_RANK
        translation.left_out.append(f"the file trains an adapter without a rank — here {_USUAL_RANK}")
    elif said & {"full", "none", "false"} and of_adapter:
        for key in of_adapter:
            del values[key]
        translation.left_out.append(f"{', '.join(of_adapter)} — the file trains all weights")


def _with_entries(keys: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the keys with `dataset` of LLaMA-Factory as entries of its dataset_info.json."""
    if not isinstance(keys.get("dataset"), str) or not ("stage" in keys or "dataset_dir" in keys):
        return keys
    others = dict(keys)
    source = {"path": others.pop("dataset_dir", None) or "data", "limit": others.pop("max_samples", None)}
    for theirs, entries in (("dataset", "datasets"), ("eval_dataset", "test_datasets")):
        names = str(others.pop(theirs, None) or "").split(",")
        others[entries] = [{**source, "name": name.strip()} for name in names if name]
    return others


def _with_terms(keys: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the keys with several losses and their weights as the terms of one."""
    kinds = keys.get("loss_type")
    if not isinstance(kinds, list) or len(kinds) < 2:
        return keys
    others = dict(keys)
    weights = others.pop("loss_weights", None) or [1.0] * len(kinds)
    terms = []
    for kind, weight in zip(others.pop("loss_type"), weights, strict=True):
        named = [each for each in (kind, *equivalents(kind, "values")) if fits("loss.kind", each)]
        terms.append({"kind": named[0] if named else kind, "weight": weight})
    return {"loss_terms": terms, **others}


def _flat(keys: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield keys with a value; of a mapping whose own name has no meaning, the keys inside."""
    for name, value in keys.items():
        if value in _EMPTY:
            continue
        if isinstance(value, Mapping) and not (is_foreign(name) and _meaning_of(name, value).fitting):
            yield from _flat({f"{name}.{inner}": of_inner for inner, of_inner in value.items()})
        else:
            yield str(name), value


class _Meaning(NamedTuple):
    """What a key of theirs with its value may mean.

    For `torch_dtype: bfloat16`, `targets`, our keys of the same meaning, are `model.dtype`, and `fitting`,
    those that can have the value, with it in our words, `(model.dtype, bf16)`. `answer`: what else is said on
    the name. `overrides`: our keys that it sets for this value.
    """

    targets: list[str]
    fitting: list[tuple[str, Any]]
    answer: Answer | None
    overrides: dict[str, Any]
    is_off: bool  # a switch that is false

    def reason(self, value: Any) -> str:
        """Return why the key is left out, if it is."""
        if self.is_off:
            return "not needed: it is off"
        if self.answer:
            return self.answer.text
        if self.targets:
            return f"{self.targets[0]} cannot be {as_written(value)[:_LONGEST]}"
        return "no counterpart is known"


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
    forms: list[Any] = [value, text.lower(), *equivalents(text, "values")]
    if isinstance(value, list):
        forms = [as_sources(value), *value[:1]]
    elif isinstance(value, dict):
        forms = [value]
    elif isinstance(value, str):
        forms += [[word.strip() for word in text.split(",")], [value]]
    fitting = []
    if not on_value:  # an answer to this very value, `loss_type: bco_unpaired`, goes before a key that fits
        for target in targets:
            # A name of ours goes before a text as it stands, which may fit as a list of one.
            named = [each for each in equivalents(text, "values") if each in choices(run_keys().get(target))]
            fitting += [(target, form) for form in (*named, *forms) if fits(target, form)]
    answer = on_value or on_name
    has_value = on_name != answer_on(name, "")  # the answer's words have the user's value
    is_certain = bool(on_value) or value is True or has_value
    overrides = _keys_of(answer.words) if answer and is_certain and not fitting else {}
    is_off = bool(answer) and not on_value and value is False and is_switch(name)
    return _Meaning(targets, fitting, answer, overrides, is_off)


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
