"""Arguments that a chat template reads besides messages and tools."""

import re
from collections.abc import Collection, Iterable
from functools import lru_cache

from jinja2 import Environment, TemplateError, nodes
from jinja2.meta import find_undeclared_variables

from dpo_dist.errors import ConfigError, first_line

# Tags of transformers, which Jinja itself does not know.
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
_OWN_VARIABLES = {"messages", "tools", "add_generation_prompt"}


@lru_cache(maxsize=8)
def argument_names(template: str) -> frozenset[str]:
    """Return the names of the arguments that a template may get besides messages and tools.

    Names that the template sets before it reads them are no arguments.

    Raises:
        ConfigError: the template cannot be parsed.
    """
    source = _GENERATION.sub("", template)
    environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)  # noqa: S701
    try:
        tree = environment.parse(source)
    except (TemplateError, RecursionError) as fault:
        raise ConfigError(
            "the chat template is not valid Jinja",
            where="data.chat_template (null: the tokenizer's own)",
            got=first_line(fault),
            remedy="correct the template, or name another one: data.chat_template=FILE",
        ) from fault
    return frozenset(_read_unset(tree, set()) & find_undeclared_variables(tree)) - _OWN_VARIABLES


def _read_unset(node: nodes.Node, known: set[str]) -> set[str]:
    """Return the names that a part of a template reads unset; those that it sets are added to `known`."""
    match node:
        case nodes.Name(ctx="load"):
            return {node.name} - known
        case nodes.Name():
            known.add(node.name)
            return set()
        case nodes.If():
            read = _read_in_order((node.test, *(other.test for other in node.elif_)), known)
            branches = [(part, set(known)) for part in (node.body, *(e.body for e in node.elif_), node.else_)]
            read |= set().union(*(_read_in_order(part, inside) for part, inside in branches))
            known.update(*(inside for _, inside in branches))
            return read
        case nodes.Assign():
            return _read_in_order((node.node, node.target), known)
        case nodes.For():
            target, values, *body = node.iter_child_nodes()
            return _read_in_order((values, target, *body), set(known))
        case nodes.Macro() | nodes.CallBlock() | nodes.With():
            return _read_in_order(node.iter_child_nodes(), set(known))
    return _read_in_order(node.iter_child_nodes(), known)


def _read_in_order(parts: Iterable[nodes.Node], known: set[str]) -> set[str]:
    return set().union(*(_read_unset(part, known) for part in parts))


def check_arguments(arguments: Iterable[str], known: Collection[str]) -> None:
    """Check that a template names each of the arguments of the run.

    Raises:
        ConfigError: it does not name one.
    """
    if unknown := sorted(set(arguments) - set(known)):
        raise ConfigError(
            "the chat template has no such argument",
            where="data.template_arguments",
            got=", ".join(unknown),
            expected=", ".join(sorted(known)) or "no arguments: the template names none",
            remedy="correct or remove these arguments, or choose another template by data.chat_template",
        )
