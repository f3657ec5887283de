"""Expressions over the columns of a record: data in, data out.

Jinja parses them; what they mean is only what stands here. So an expression of a stranger can read the record
and nothing else: there are no calls, no attributes, no loops, and no value grows beyond the record and the
expression. Where Jinja would go on with another value than meant (a method that is found before a key, `None`
in a text, 0 for a word, a text that no number equals), here is an error.
"""

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache, reduce
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.parser import Parser
from jinja2.visitor import NodeTransformer

from dpo_dist.data.read.plain import from_json, is_given, to_number
from dpo_dist.data.records import DIALOGUE_START, UnusableRecordError, shown_key
from dpo_dist.foundation.types import Fields

_ROW = "row"
_TWICE = "a look-up has a key twice"
_ENVIRONMENT = Environment()  # noqa: S701  (for its parser alone: nothing is rendered)


class ExpressionError(ValueError):
    """A text is no expression, or a part of it has no value; the words quote no text of a record."""


class NoValueError(ExpressionError):
    """A part has no value; `default` gives it one."""


class _Strict(dict[str, Any]):
    """A record of which nothing is compared: a missing verdict is no bad one."""


class Expression:
    """An expression, parsed once.

    `columns` are those that it reads; the `optional` ones may be absent: COLUMN|default(none). `keys`
    has the pairs of COLUMN|map(attribute='KEY'). Raises ExpressionError.
    """

    def __init__(self, text: str):
        self.text = text
        try:
            parser = Parser(_ENVIRONMENT, text, state="variable")
            self._node = _Columns().visit(parser.parse_expression())
            if not parser.stream.eos:
                raise ExpressionError("words after its end")
            every = [*_all_nodes(self._node)]
        except (TemplateError, RecursionError, ValueError) as fault:
            raise ExpressionError(str(fault).partition("\n")[0]) from fault
        for node in every:
            _check(node)
        self.columns = frozenset(node.name for node in every if isinstance(node, nodes.Name))
        filters = [node for node in every if isinstance(node, nodes.Filter)]
        of_columns = [(each.node.name, each) for each in filters if isinstance(each.node, nodes.Name)]
        self.optional = frozenset(column for column, each in of_columns if each.name == _DEFAULT)
        self.keys = [(column, key) for column, each in of_columns for key in _keys_of_items(each)]

    def __call__(self, record: Fields, *, is_strict: bool = False) -> Any:
        """Return the value for a record; a column that it lacks is None.

        With `is_strict` a comparison with nothing is an error, but for that with `none`.
        Raises UnusableRecordError: `expression_failed`; the detail quotes no text of the record.
        """
        if isinstance(self._node, nodes.Name):  # fast path: a column
            return record.get(self._node.name)
        try:
            return _value(self._node, _Strict(record) if is_strict else record)
        except ExpressionError as fault:
            why = str(fault)
        except Exception as fault:
            why = type(fault).__name__
        raise UnusableRecordError("expression_failed", f"{self.text}: {why}")


@lru_cache(maxsize=1024)
def expression(text: str) -> Expression:
    """Return an expression, parsed once in a process. Raises ExpressionError."""
    return Expression(text)


def _keys_of_items(node: nodes.Filter) -> list[str]:
    """Return the key of ITEMS|map(attribute='KEY'), none for another filter."""
    paths = [option.value for option in node.kwargs if node.name == "map"]
    return [str(path.value).partition(".")[0] for path in paths if isinstance(path, nodes.Const)]


class _Columns(NodeTransformer):
    """Turns row['NAME'] and row.NAME into the column, and any other .NAME into ['NAME']."""

    def visit_Getattr(self, node: nodes.Getattr) -> nodes.Node:  # noqa: N802
        return self.visit_Getitem(nodes.Getitem(node.node, nodes.Const(node.attr), "load"))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        if node.node == nodes.Name(_ROW, "load") and isinstance(node.arg, nodes.Const):
            return nodes.Name(str(node.arg.value), "load")
        return self.generic_visit(node)


def _all_nodes(node: nodes.Node) -> Iterator[nodes.Node]:
    yield node
    for child in node.iter_child_nodes():
        yield from _all_nodes(child)


def _check(node: nodes.Node) -> None:
    """Check that a node has a meaning here. Raises ExpressionError."""
    if type(node) not in _MEANINGS and not isinstance(node, _PARTS):
        raise ExpressionError(f"there is no {type(node).__name__} in an expression")
    if isinstance(node, nodes.Name) and node.name == _ROW:
        raise ExpressionError("after row stands the name of a column: row['NAME']")
    if isinstance(node, nodes.CondExpr) and node.expr2 is None:
        raise ExpressionError("an if without else")
    if isinstance(node, nodes.Dict):
        keys = [pair.key for pair in node.items]
        if any(key in keys[:place] for place, key in enumerate(keys)):
            raise ExpressionError(_TWICE)
    if isinstance(node, nodes.Filter | nodes.Test):
        known: Mapping[str, Any] = _FILTERS if isinstance(node, nodes.Filter) else _TESTS
        if node.name not in known or node.dyn_args or node.dyn_kwargs:
            raise ExpressionError(f"{node.name}: there are only {', '.join(known)}")


def _value(node: nodes.Node, record: Fields) -> Any:
    return _MEANINGS[type(node)](node, record)


def _flag(node: nodes.Node, record: Fields) -> bool:
    value = _value(node, record)
    if not isinstance(value, bool):
        raise ExpressionError("a condition is neither true nor false")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ExpressionError("no number where one is needed; COLUMN|number reads a number from a text")
    return value


def _arithmetic(node: Any, record: Fields) -> Any:
    left = _value(node.left, record)
    right = _value(node.right, record)
    if isinstance(node, nodes.Add) and isinstance(left, list) and isinstance(right, list):
        return left + right
    function = {nodes.Add: operator.add, nodes.Sub: operator.sub, nodes.Div: operator.truediv}[type(node)]
    return function(_number(left), _number(right))


def _item(value: Any, key: Any) -> Any:
    """Return the item of an object or a list, or a part of a text; a flag is no key or place of a number.

    A place in a text has no value: a list is meant, where one record has a text.
    """
    if isinstance(value, Mapping):
        if key in value and (not isinstance(key, bool) or any(key is each for each in value)):
            return value[key]
    elif isinstance(key, slice):
        if isinstance(value, list | str):
            return value[key]
    elif (
        isinstance(value, list)
        and isinstance(key, int)
        and not isinstance(key, bool)
        and -len(value) <= key < len(value)
    ):
        return value[key]
    kind = {str: "the text ", int: "the number ", float: "the number "}.get(type(key), "")
    raise NoValueError(f"nothing for {kind}{shown_key(key)}")


def _getitem(node: nodes.Getitem, record: Fields) -> Any:
    value = _value(node.node, record)
    if not isinstance(node.arg, nodes.Slice):
        is_key = isinstance(value, Mapping)
        return _item(value, _value(node.arg, record) if is_key else _place(node.arg, record))
    ends = (node.arg.start, node.arg.stop, node.arg.step)
    return _item(value, slice(*(end and _number(_place(end, record)) for end in ends)))


def _place(node: nodes.Node, record: Fields) -> Any:
    """Return a place in a list or a text; one that is computed does not count from the end."""
    place = _value(node, record)
    is_literal = isinstance(node, nodes.Neg) and isinstance(node.node, nodes.Const)
    if isinstance(place, int | float) and place < 0 and not is_literal:
        raise ExpressionError("a place that is computed is negative")
    return place


def _compare(node: nodes.Compare, record: Fields) -> bool:
    [operand] = node.ops
    left = _value(node.expr, record)
    right = _value(operand.expr, record)
    says_none = nodes.Const(None) in (node.expr, operand.expr)
    if isinstance(record, _Strict) and not says_none and (left is None or right is None):
        raise NoValueError("nothing is compared; COLUMN|default('') stands for it")
    match operand.op:
        case "eq" | "ne" as sign:
            return _equal(left, right) is (sign == "eq")
        case "in" | "notin" as sign:
            values = right if isinstance(right, list) else [*right] if isinstance(right, Mapping) else None
            is_in = left in right if values is None else any(_equal(left, value) for value in values)
            return is_in is (sign == "in")
        case sign:
            orders = {"lt": operator.lt, "lteq": operator.le, "gt": operator.gt, "gteq": operator.ge}
            return bool(orders[sign](_number(left), _number(right)))


def _equal(left: Any, right: Any) -> bool:
    if None not in (left, right) and isinstance(left, str) is not isinstance(right, str):
        raise ExpressionError(
            "a text is compared with what is none; COLUMN|number reads a number from a text"
        )
    return bool(left == right)


def _filtered(node: nodes.Filter, record: Fields) -> Any:
    assert node.node is not None, "a filter of an expression has a value"
    if node.name == _DEFAULT:
        with suppress(NoValueError):
            value = _value(node.node, record)
            if value is not None:
                return value
        [instead] = node.args
        return _value(instead, record)
    arguments = [_value(argument, record) for argument in node.args]
    options = {str(option.key): _value(option.value, record) for option in node.kwargs}
    value = _value(node.node, record)
    if node.name in _OF_LISTS and not isinstance(value, list):
        raise ExpressionError(f"{node.name} is for a list")  # of a text it would take the characters
    return _FILTERS[node.name](value, *arguments, **options)


def _join(texts: list[str], between: str = "") -> str:
    """Return texts in one text; a value of another type is an error."""
    if len(between) * len(texts) > 2**20:
        raise ExpressionError("too much between the texts")
    return between.join(texts)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else str(_number(value))


def _map(items: list[Any], name: str = "", *, attribute: str = "") -> list[Any]:
    """Return what is at a path in each item, or what a filter without arguments makes of it."""
    if name:
        return [_OF_ITEMS[name](item) for item in items]
    keys = [int(part) if part.isdecimal() else part for part in attribute.split(".")]
    return [reduce(_item, keys, item) for item in items]


def _select_by(items: list[Any], key: str, wanted: Any = True) -> list[Any]:
    """Return the objects of a list whose value of a key equals another; one without the key has none."""
    return [item for item in items if _equal(item.get(key), wanted)]


def _turn(content: Any, role: str = "user") -> list[dict[str, Any]]:
    """Return a text as one turn of a conversation."""
    return [{"role": role, "content": content}]


def _from_python(value: Any) -> Any:
    """Return what a text holds as Python prints lists, objects, texts and numbers."""
    return ast.literal_eval(value.strip()) if isinstance(value, str) else value


_DEFAULT = "default"
_OF_LISTS = ("join", "map", "select", "selectattr")
_OF_ITEMS: dict[str, Callable[..., Any]] = {
    "fromjson": from_json,
    "frompython": _from_python,
    "number": to_number,
    "trim": str.strip,
    "lower": str.lower,
    "length": len,
}
"""Filters without arguments, whose result is no larger than their value."""
_FILTERS: dict[str, Callable[..., Any]] = _OF_ITEMS | {
    "turn": _turn,
    "join": _join,
    "split": str.split,
    "map": _map,
    "select": lambda items: [item for item in items if is_given(item)],
    "selectattr": _select_by,
    _DEFAULT: lambda value, _instead: value,  # also for a part without a value: see `_filtered`
}
_TESTS: dict[str, Callable[[Any], bool]] = {
    "none": lambda value: value is None,
    "string": lambda value: isinstance(value, str),
    "mapping": lambda value: isinstance(value, Mapping),
    "list": lambda value: isinstance(value, list),
    "dialogue": lambda value: isinstance(value, str) and DIALOGUE_START.match(value) is not None,
}
_PARTS = (nodes.Pair, nodes.Operand, nodes.Keyword, nodes.Slice)


def _list(node: Any, record: Fields) -> list[Any]:
    return [_value(item, record) for item in node.items]


def _look_up(node: Any, record: Fields) -> dict[Any, Any]:
    values = {_value(pair.key, record): _value(pair.value, record) for pair in node.items}
    if len(values) < len(node.items):
        raise ExpressionError(_TWICE)
    return values


_MEANINGS: dict[type[nodes.Node], Callable[[Any, Fields], Any]] = {
    nodes.Const: lambda node, _record: node.value,
    nodes.Name: lambda node, record: record.get(node.name),
    nodes.List: _list,
    nodes.Tuple: _list,
    nodes.Dict: _look_up,
    nodes.Getitem: _getitem,
    nodes.And: lambda node, record: _flag(node.left, record) and _flag(node.right, record),
    nodes.Or: lambda node, record: _flag(node.left, record) or _flag(node.right, record),
    nodes.Not: lambda node, record: not _flag(node.node, record),
    nodes.CondExpr: lambda n, record: _value(n.expr1 if _flag(n.test, record) else n.expr2, record),
    nodes.Compare: _compare,
    nodes.Test: lambda node, record: _TESTS[node.name](_value(node.node, record)),
    nodes.Filter: _filtered,
    nodes.Concat: lambda node, record: "".join(_as_text(_value(part, record)) for part in node.nodes),
    nodes.Add: _arithmetic,
    nodes.Sub: _arithmetic,
    nodes.Div: _arithmetic,
    nodes.Neg: lambda node, record: -_number(_value(node.node, record)),
}
