"""Items to label: two responses to a prompt, drawn from the records of sources, and their display."""

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dpo_dist.data.records import Dialogue, Message, Messages, PreferenceRecord, Prompt, Response
from dpo_dist.generation.pair_records import as_fields

_THOUGHTS = ("reasoning_content", "thinking", "reasoning", "thoughts")


@dataclass(frozen=True)
class Item:
    """Two responses to a prompt.

    Attributes:
        key: digest of prompt and responses, whatever their order and origin.
        record: the prompt and the two responses, in an order that is unrelated to quality.
    """

    key: str
    record: PreferenceRecord


def draw_items(
    records: Iterable[PreferenceRecord], most: int | None, seed: int, counts: Counter[str]
) -> list[Item]:
    """Return at most `most` items of the records, drawn at random; a record gives one item.

    The draw follows from the seed and the contents: it changes little when records are added. Memory: the
    drawn items only.

    Args:
        records: those with more than two responses give two of them, drawn at random.
        most: number of items; None: all.
        seed: of both draws.
        counts: gets `read`, and records that give no item by reason.
    """
    kept: dict[str, Item] = {}
    heap: list[tuple[int, str]] = []
    for item in _items(records, seed, counts):
        if item.key in kept:
            counts["duplicate"] += 1
            continue
        rank = -_number(seed, "draw", item.key)
        if most is None or len(heap) < most:
            heapq.heappush(heap, (rank, item.key))
        else:
            _, dropped = heapq.heappushpop(heap, (rank, item.key))
            counts["not_drawn"] += 1
            if dropped == item.key:
                continue
            del kept[dropped]
        kept[item.key] = item
    return list(kept.values())


def _items(records: Iterable[PreferenceRecord], seed: int, counts: Counter[str]) -> Iterator[Item]:
    for record in records:
        counts["read"] += 1
        if len(record.responses) < 2:
            counts["one_response"] += 1
        else:
            yield _item(record, seed)


def _item(record: PreferenceRecord, seed: int) -> Item:
    prompt, *responses = (_digest(part) for part in as_fields(record.prompt, record.responses))
    drawn = sorted(range(len(responses)), key=lambda index: _number(seed, prompt, responses[index]))[:2]
    first, second = sorted(drawn, key=lambda index: responses[index])
    pair = replace(record, responses=(record.responses[first], record.responses[second]), scores=None)
    return Item(_digest([prompt, responses[first], responses[second]]), pair)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def _number(seed: int, *names: str) -> int:
    digest = hashlib.blake2b("\0".join([str(seed), *names]).encode(), digest_size=8).digest()
    return int.from_bytes(digest)


def shown_prompt(record: PreferenceRecord) -> list[dict[str, Any]]:
    """Return the turns of the prompt as the page shows them, after the names of the tools."""
    turns = [_turn(turn) for turn in _turns(record.prompt)]
    names = [_tool_name(tool) for tool in record.tools]
    tools = [{"role": "tools", "texts": [{"kind": "text", "text": ", ".join(names)}]}] if names else []
    return tools + turns


def shown_response(response: Response) -> list[dict[str, Any]]:
    """Return the turns of a response as the page shows them; the role of a single answer is empty."""
    if isinstance(response, str):
        return [{"role": "", "texts": [{"kind": "text", "text": response}]}]
    turns = [_turn(turn) for turn in response]
    return [turns[0] | {"role": ""}] if len(turns) == 1 else turns


def _turns(prompt: Prompt) -> Messages:
    if isinstance(prompt, Dialogue):
        return prompt.messages()
    return (Message("", prompt),) if isinstance(prompt, str) else prompt


def _turn(message: Message) -> dict[str, Any]:
    """Return the parts of a turn: thoughts, text, and every other field as JSON."""
    texts = []
    others = dict(message.fields)
    for name in _THOUGHTS:
        thoughts = others.pop(name, None)
        if thoughts:
            texts.append({"kind": "thoughts", "text": str(thoughts)})
    if message.content:
        texts.append({"kind": "text", "text": message.content})
    for name, value in others.items():
        if value:
            text = (
                value
                if isinstance(value, str)
                else json.dumps(value, ensure_ascii=False, indent=1, default=str)
            )
            texts.append({"kind": "field", "name": str(name), "text": text})
    return {"role": message.role, "texts": texts}


def _tool_name(tool: Mapping[str, Any]) -> str:
    function = tool.get("function")
    return str((function if isinstance(function, Mapping) else tool).get("name", "?"))
