"""The rules about the data: sources, evaluation data, lengths, chat templates, rankings."""

import difflib
from dataclasses import replace
from datetime import date

from dpo_dist.config.check import Rule
from dpo_dist.config.data_schema import (
    MARKER_GAP,
    UNTRAINED_PARTS,
    DataConfig,
    DataFormat,
    Ranked,
    SourceConfig,
)

OTHER_ROLE_NAMES = frozenset(
    {
        *("human", "Human", "User", "gpt", "chatgpt", "bot", "Assistant"),
        *("observation", "tool_response", "function", "function_call", "tool_call"),
    }
)
"""Roles of datasets that are read as user, assistant or tool."""


_ROLES = ("system", "user", "assistant", "tool")


def _is_mistyped_role(role: str) -> bool:
    """Return whether a role is nearly a usual one; a role of another name may be one of the records."""
    return role not in _ROLES and role.isalpha() and bool(difflib.get_close_matches(role, _ROLES, cutoff=0.8))


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


def _has_rankings(data: DataConfig) -> bool:
    """Return whether a source may have rankings, by its format."""
    return any(source.format in (DataFormat.auto, DataFormat.ranked) for source in [*data.train, *data.eval])


def _is_untrained_part(entry: str) -> bool:
    begin, _, end = entry.partition(MARKER_GAP)
    return entry in UNTRAINED_PARTS or bool(begin.strip() and end.strip())


def _is_repeated(sources: list[SourceConfig]) -> bool:
    """Return whether two sources are equal apart from their weights."""
    bare = [replace(source, weight=SourceConfig.weight) for source in sources]
    return any(source in bare[:index] for index, source in enumerate(bare))


DATA_RULES = (
    Rule(
        "data.train",
        lambda c: _is_repeated(c.data.train),
        "a source of data.train is given twice",
        "remove one of them; weight: 2 draws each of its pairs twice per epoch",
    ),
    Rule(
        "data.eval",
        lambda c: _is_repeated(c.data.eval),
        "a source of data.eval is given twice",
        "remove one of them",
    ),
    Rule(
        "data.eval",
        lambda c: any(source.weight != SourceConfig.weight for source in c.data.eval),
        "a weight has no effect on evaluation data: every pair counts once",
        "remove the weight, or set limit",
    ),
    Rule(
        "data.eval data.eval_share",
        lambda c: bool(c.data.eval) and c.data.eval_share > 0,
        "evaluation data are given twice: by their sources and as a share of the training data",
        "remove data.eval_share; data.drop_eval_prompts=true keeps prompts of data.eval out of training",
    ),
    Rule(
        "data.eval_seed",
        lambda c: c.data.eval_seed != DataConfig.eval_seed and not c.data.eval_share,
        "the seed has no effect without a share of held-out prompts",
        "set data.eval_share, or remove data.eval_seed",
    ),
    Rule(
        "data.drop_eval_prompts",
        lambda c: c.data.drop_eval_prompts and not c.data.eval,
        "no evaluation data are given whose prompts could be dropped",
        "set data.eval, or remove data.drop_eval_prompts (data.eval_share never shares a prompt)",
    ),
    Rule(
        "data.max_prompt_length data.max_length",
        lambda c: c.data.max_prompt_length is not None and c.data.max_prompt_length >= c.data.max_length,
        "the longest prompt leaves no room for a response",
        "raise data.max_length or lower data.max_prompt_length",
        "max_prompt_length < max_length",
    ),
    Rule(
        "data.template_date",
        lambda c: not _is_date(c.data.template_date),
        "data.template_date is not a date",
        f"write data.template_date={DataConfig.template_date}; other days in the same form",
        f"YYYY-MM-DD, such as {DataConfig.template_date}",
    ),
    Rule(
        "data.template_arguments",
        lambda c: not isinstance(c.data.template_arguments, dict | None),
        "data.template_arguments is not a mapping",
        "write 'data.template_arguments={{enable_thinking: false}}'",
        "null or a mapping of names and values",
    ),
    Rule(
        "data.trained_roles",
        lambda c: not c.data.trained_roles or not all(c.data.trained_roles),
        "data.trained_roles names no role, so the loss would count nothing",
        "write data.trained_roles=[assistant]",
        "a list of roles",
    ),
    Rule(
        "data.trained_roles",
        lambda c: bool(OTHER_ROLE_NAMES.intersection(c.data.trained_roles)),
        "data.trained_roles has a name that is read as another role",
        "write user, assistant or tool; docs/data.md lists the roles",
        "roles such as assistant, user, tool",
    ),
    Rule(
        "data.trained_roles",
        lambda c: any(map(_is_mistyped_role, c.data.trained_roles)),
        "data.trained_roles has a role that seems to be mistyped",
        "write assistant, user, tool or system",
        "roles such as assistant, user, tool",
    ),
    Rule(
        "data.untrained",
        lambda c: not all(map(_is_untrained_part, c.data.untrained)),
        "data.untrained has an entry that is neither a named part nor a pair of markers",
        "write a marker as BEGIN...END, such as '<note>...</note>'",
        f"a list of {', '.join(UNTRAINED_PARTS)} and BEGIN...END",
    ),
    Rule(
        "data.ranked data.train",
        lambda c: c.data.ranked is not Ranked.whole and not _has_rankings(c.data),
        "data.ranked has no effect: no source has rankings",
        "set data.ranked=whole, or remove the format of the source that has rankings",
        "a source of format ranked or auto",
    ),
)


def _is_model(model: object) -> bool:
    """Return whether `evaluation.model` names models: null, a path, or paths that differ."""
    models = model if isinstance(model, list) else [model]
    if not all(isinstance(each, str) and each for each in models):
        return model is None
    return bool(models) and len(set(models)) == len(models)


EVALUATION_RULES = (
    Rule(
        "evaluation.model",
        lambda c: not _is_model(c.evaluation.model),
        "evaluation.model names no model, or one twice",
        "write evaluation.model=FOLDER, or 'evaluation.model=[FOLDER,FOLDER]' for several in turn",
        "null, a path, or a list of paths that differ",
    ),
    Rule(
        "evaluation.data",
        lambda c: _is_repeated(c.evaluation.data),
        "a source of evaluation.data is given twice",
        "remove one of them",
    ),
    Rule(
        "evaluation.data",
        lambda c: any(source.weight != SourceConfig.weight for source in c.evaluation.data),
        "a weight has no effect on evaluation data: every pair counts once",
        "remove the weight, or set limit",
    ),
)
