"""The language of `fields`: what its expressions mean, and that they can do nothing but read the record."""

import copy
import time
from typing import Any

import pytest

from dpo_dist.data.read.expressions import Expression, ExpressionError
from dpo_dist.data.records import UnusableRecordError

RECORD: dict[str, Any] = {
    **{"t": "hello", "n": 3, "f": 0.5, "yes": True, "none_": None, "five": "5", "secret": "my password"},
    "l": [1, 2, 3],
    "d": {"items": "I", "keys": "K", "x": {"y": 1}, "get": None},
    "m": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "best": True}],
    "a b": "spaced",
    "minus": -1,
    "self": "a column",
    "json": '{"a": [1]}',
    "printed": "['x', 'y']",
}


def value(text: str, **changes: Any) -> Any:
    return Expression(text)(RECORD | changes)


def why(text: str, **changes: Any) -> str:
    """Return the detail of the error of an expression that has no value."""
    with pytest.raises(UnusableRecordError, match="expression_failed") as raised:
        value(text, **changes)
    assert RECORD["secret"] not in raised.value.detail
    return raised.value.detail


MEANINGS = {
    "t": "hello",
    "absent": None,
    "row['a b']": "spaced",
    "row.t": "hello",
    "self": "a column",
    "d.items": "I",  # a method of a dictionary in Jinja
    "d.keys": "K",
    "d['x'].y": 1,
    "d.get": None,
    "m[-1].content": "ho",
    "m[0]['role']": "user",
    "l[1:]": [2, 3],
    "t[:2]": "he",
    "t[-2:]": "lo",
    "l[:-1]": [1, 2],
    "l[n - 1]": 3,
    "{-1: 'worse', 1: 'better'}[-1]": "worse",
    "{-1: 'worse', 1: 'better'}[minus]": "worse",
    "{0: 'x', '0': 'y'}[0]": "x",
    "m[:-1] + [m[1]]": RECORD["m"],
    "n + 1 - f": 3.5,
    "n / 2": 1.5,
    "-n": -3,
    "five|number + 1": 6.0,
    "t ~ '-' ~ n": "hello-3",
    "[t, none_, '', five]|select|join(', ')": "hello, 5",
    "{'A': [t, five], 'B': [five, t]}['B']": ["5", "hello"],
    "{3: 'three'}[n]": "three",
    "{true: 'good', false: 'bad'}[yes]": "good",
    "t if n > 2 else five": "hello",
    "n == 3 and not (n != 3) or false": True,
    "none_ == 'a'": False,
    "n in [1, 3]": True,
    "'ell' in t": True,
    "'x' not in d": False,
    "t is string and l is list and d is mapping and none_ is none and n is not string": True,
    "absent|default('x')": "x",
    "none_|default(t)": "hello",
    "d.nothing.deep|default(none)": None,
    "d.x|default(d.nothing)": {"y": 1},
    "json|fromjson": {"a": [1]},
    "d|fromjson": RECORD["d"],
    "' '|fromjson": None,
    "printed|frompython": ["x", "y"],
    "t|turn": [{"role": "user", "content": "hello"}],
    "t|turn('system')": [{"role": "system", "content": "hello"}],
    "m|map(attribute='content')": ["hi", "ho"],
    "[d]|map(attribute='x.y')": [1],
    "[five]|map('number')": [5.0],
    "(m|selectattr('best'))[0].content": "ho",
    "m|selectattr('role', 'user')|length": 1,
    "' a B '|trim|lower": "a b",
    "'a|b'|split('|')": ["a", "b"],
}


@pytest.mark.parametrize("text", MEANINGS)
def test_an_expression_means(text: str) -> None:
    before = copy.deepcopy(RECORD)
    found = value(text)
    assert (found, type(found)) == (MEANINGS[text], type(MEANINGS[text]))
    assert before == RECORD


STRICT = {
    "none_ == 'a'": "nothing is compared",
    "absent != 'a'": "nothing is compared",
    "d.deep['x'] not in [1]": "nothing is compared",
    "'x' if none_ == 'a' else 'y'": "nothing is compared",
    "(none_ == 'a')|default(false)": False,
    "none_|default('') == 'a'": False,
    "none_ is not none and none_ == 'a'": False,
    "none_ == none": True,
}


@pytest.mark.parametrize("text", STRICT)
def test_a_strict_expression_compares_no_missing_verdict(text: str) -> None:
    record = RECORD | {"d": {"deep": {"x": None}}}
    if isinstance(STRICT[text], bool):
        assert Expression(text)(record, is_strict=True) is STRICT[text]
        return
    with pytest.raises(UnusableRecordError) as raised:
        Expression(text)(record, is_strict=True)
    assert str(STRICT[text]) in raised.value.detail


# Where Jinja has another value than the author means.
NO_VALUE = {
    "d.nothing": "nothing for the text nothing",
    "l[7]": "nothing for the number 7",
    "none_.x": "nothing for the text x",
    "{'A': 1, 'B': 2}['tie']": "nothing for the text tie",
    "{1: 'one', 2: 'two'}[five]": "nothing for the text 5",
    "{1: 'one'}[yes]": "nothing for True",
    "l[yes]": "nothing for True",
    "t[0]": "nothing for the number 0",
    "t[-1]": "nothing for the number -1",
    "[t]|map(attribute='0')": "nothing for the number 0",
    "l[2 - n]": "a place that is computed is negative",
    "l[minus]": "a place that is computed is negative",
    "l[-n]": "a place that is computed is negative",
    "l[minus:]": "a place that is computed is negative",
    "t[:2 - n]": "a place that is computed is negative",
    "l[:none_]": "no number",
    "l[yes:]": "no number",
    "n[0:]": "nothing for ",
    "{t: 1, d.items: 2, 'I': 3}[t]": "a key twice",
    "five == 5": "COLUMN|number",
    "five in [5]": "COLUMN|number",
    "five > 4": "COLUMN|number",
    "t < 'z'": "no number",
    "t ~ none_": "no number",
    "[t, none_]|join": "TypeError",
    "t + 'x'": "no number",
    "yes + 1": "no number",
    "t|join": "join is for a list",
    "t|select|join": "select is for a list",
    "d|map('length')": "map is for a list",
    "t|selectattr('role')": "selectattr is for a list",
    "(five == 5)|default(none)": "COLUMN|number",
    "t|number": "ValueError",
    "yes|number": "ValueError",
    "none_|number": "TypeError",
    "'nan'|number": "ValueError",
    "t|fromjson": "JSONDecodeError",
    "t if t else five": "neither true nor false",
    "not t": "neither true nor false",
    "t and yes": "neither true nor false",
    "'false' or yes": "neither true nor false",
    "m|map(attribute='best')": "nothing for the text best",
    "none_|length": "TypeError",
    "l|join(t)": "TypeError",
    "secret[99]": "nothing for the number 99",
    "secret|number": "ValueError",
    "{'x': 1}[secret ~ secret ~ secret ~ secret]": "a name of 44 characters",
}


@pytest.mark.parametrize("text", NO_VALUE)
def test_a_part_without_a_value_is_an_error_that_quotes_no_text(text: str) -> None:
    assert NO_VALUE[text] in why(text)


HOSTILE = [
    *(
        "t|attr('__class__')",
        "d.items()",
        "d.pop('x')",
        "l.append(9)",
    ),
    *("t.upper()", "t.format(t)", "'{0.__class__}'.format(t)", "t.encode()", "range(10)", "lipsum(n=9)"),
    *("cycler(1)", "namespace(a=1)", "dict(a=1)", "row.clear()", "row", "row[t]", "row|length", "self.x()"),
    *("t * 10**9", "l * 99999999", "n ** 9999999", "'%1000000d' % n", "t // 2", "n * n"),
    *("t|center(10**9)", "t|replace('', t)", "t|list", "t|tojson", "t|pprint", "l|sum", "l|sort", "l|random"),
    *("l|groupby('x')", "t|xmlattr", "t|urlize", "t|float", "t|int", "t is callable", "t is defined"),
    *(
        "l|map(*l)",
        "l|map(**d)",
        "l|join(*l)",
        "t if n == 4",
        "a b",
        "{{ t }}",
        "{% set x = 1 %}",
        "t if",
        "",
        "loop()",
    ),
    *("caller()", "super()", "(t)(t)", "[x for x in l]", "lambda: 1", "t;t", "t = 1", "t := 1", "import os"),
    *("9" * 5000, "{'A': t, 'A': five}['A']", "{1: t, true: five}[1]", "{t: 1, n: 2, t: 3}[t]"),
    *("(" * 3000 + "t" + ")" * 3000, "not " * 5000 + "yes", "[" * 3000),
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:30])
def test_calls_attributes_growth_and_statements_are_no_expression(text: str) -> None:
    with pytest.raises(ExpressionError):
        Expression(text)


GROWING = [
    "t.__class__",
    "''.__class__.__base__",
    "l|map('map')",
    "l|map('join')",
    "m|map(attribute='__class__')",
    "m|map(attribute='role.__class__')",
    "t['__class__']",
    "d['__init__']",
    "m|selectattr('__class__', 'x')|length == 0 and t",
    "'(' ~ '(' ~ printed|frompython",
    "'__import__(\"os\")'|frompython",
]


@pytest.mark.parametrize("text", GROWING)
def test_data_have_items_and_nothing_else(text: str) -> None:
    why(text)


@pytest.mark.parametrize(
    "text", ["big|split('a')|join(big)", "[big, big]|join(big)", "deep|frompython", "deep|fromjson"]
)
def test_a_value_does_not_grow_and_takes_no_time(text: str) -> None:
    begin = time.process_time()
    why(text, big="a" * 2**21, deep="(" * 50_000)
    assert time.process_time() - begin < 2


def test_columns_that_are_read_and_those_that_may_be_absent() -> None:
    found = Expression("{'a': [row['x y'], z]}[w|default(none)] if row['v']|default('') == '' else d.inner")
    assert found.columns == {"x y", "z", "w", "v", "d"}
    assert found.optional == {"w", "v"}
