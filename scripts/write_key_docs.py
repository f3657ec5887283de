"""Write the tables of docs/: keys and losses from dpo_dist/config, machines from benchmarks/machines.jsonl.

Run `make docs` after a change of a key, of a kind of loss, or of that file.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dpo_dist.config.fields import schema_fields
from dpo_dist.config.keys import Key, key_rows, section_meanings
from dpo_dist.config.losses import KINDS, KindFacts, LossConfig
from dpo_dist.config.verbs import EVERY_VERB

ROOT = Path(__file__).resolve().parents[1]
CELL = 160
"""Most characters of a cell, a phrase; the rest of a longer text is a sentence below the table."""
MODIFIERS = {"ld_alpha", "weighting", "reference_free"}
"""Options of nearly all kinds: docs/losses.md has them below the table, not in each row."""


def pages() -> dict[Path, str]:
    """Return the whole text of every page with a table."""
    docs, machines = ROOT / "docs", ROOT / "benchmarks" / "machines.jsonl"
    return {
        docs / "losses.md": _with_table(docs / "losses.md", _loss_table()),
        docs / "configuration.md": _configuration(),
        docs / "scaling.md": _with_table(docs / "scaling.md", machine_table(machines.read_text())),
    }


def _with_table(page: Path, table: str) -> str:
    """Return the text of `page` with `table` between its markers."""
    text, replaced = re.subn(
        r"(<!-- table: [^\n]*-->\n\n).*?(\n<!-- end of table -->)",
        lambda found: f"{found[1]}{table}{found[2]}",
        page.read_text(),
        flags=re.DOTALL,
    )
    assert replaced == 1, f"{page} must have one pair of markers"
    return text


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _code(text: str) -> str:
    return f"`{text}`" if text else "-"


def _loss_table() -> str:
    heading = ("kind", "loss of a pair", "options", "reference", "source")
    return _table(heading, (_loss_row(kind, facts) for kind, facts in KINDS.items()))


def _loss_row(kind: str, facts: KindFacts) -> tuple[str, ...]:
    """Return a kind's row; in the formula, each option has its default after it."""
    defaults = {f"loss.{name}": field.default for name, field in schema_fields(LossConfig).items()}
    own = {} if facts.options is None else schema_fields(facts.options)
    defaults |= {f"loss.options.{name}": field.default for name, field in own.items()}
    formula = re.sub(r"`(loss[\w.]+)`", lambda found: f"{found[0]} ({defaults[found[1]]:g})", facts.formula)
    names = [*sorted(facts.uses - MODIFIERS), *(f"options.{name}" for name in own)]
    options = ", ".join(f"`{name}`" for name in names)
    return f"`{kind}`", formula, options or "-", "yes" if facts.needs_reference else "-", facts.source


def machine_table(lines: str) -> str:
    """Return the table of machines; each line is one that `dpo-dist selftest --share` has printed."""
    rows = []
    for shared in map(json.loads, lines.splitlines()):
        speeds = [
            f"{name.removeprefix('speed of ')}: {speed['pairs_per_second']:,.0f} ({speed['mfu']:.0%})"
            for name, speed in shared["speeds"].items()
            if not name.endswith(("compile", "overlap"))
        ]
        versions = [f"{name} {shared['versions'][name] or '-'}" for name in ("torch", "CUDA")]
        outcomes = Counter(shared["checks"].values())
        checks = [f"{outcomes[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped")]
        words = (", ".join(versions), "; ".join(speeds) or "-", ", ".join(checks))
        rows.append((shared["device"], shared["date"][:10], *words))
    heading = ("device", "date", "versions", "pairs/s (MFU)", "checks")
    return _table(heading, rows) if rows else "No line yet.\n"


def _configuration() -> str:
    parts = [
        "# Configuration\n",
        "<!-- written by scripts/write_key_docs.py from dpo_dist/config; edit the declarations there -->\n",
        "    dpo-dist train my.yaml loss.beta=0.2\n",
        "trains with the keys of a YAML file of your own and of the command line:\n",
        "    # my.yaml\n    model: {path: Qwen/Qwen2.5-0.5B}\n"
        "    data: {train: [pairs.jsonl], eval_share: 0.05}\n"
        "    loss: simpo          # a preset of conf/loss; or keys, {kind: simpo, beta: 2}\n"
        "    optim.lr: 1e-6\n",
        "Every key of this page can be set in both. `--help KEY` explains a key, `--cfg job` prints the "
        "values of a run,\n`--cfg schema` the JSON schema of such files. Editors with the YAML language "
        "server (VS Code, Neovim) complete and\ncheck keys after `dpo-dist train --cfg schema > "
        "schema.json`, if the file's first line is\n`# yaml-language-server: $schema=schema.json`. "
        "All mistakes of a command are one error.\n",
        "Later values win, in this order: defaults, experiments (`+experiment=NAME`), files from left to "
        "right, the command line.\nIn each of them keys win over presets (`loss=ipo`). `loss=NAME` and "
        "presets without keys replace the whole section. If a\nkey of the command line leaves an earlier "
        "option without effect (`samples.prompts=0`), that option is at its default again.\n",
        "Hydra composes `conf/`: `config.yaml` lists the groups, and a file of a group is a preset "
        "with the bare keys of\nits section. An experiment is written like a file of your own. Both may have "
        "a list of `defaults`, which names presets\n(`loss: ipo` or Hydra's `override /loss: ipo`) and "
        "experiments that come before. `--config-dir DIR` adds groups, presets and\nexperiments of your own, "
        "which come before ours of the same name (`config.yaml` too); the `defaults` and packages of\n"
        "presets are [Hydra's](https://hydra.cc/docs/advanced/defaults_list/).\n",
        "A key in the digest defines the run's result: another value names another run directory. "
        "On the command line\na key that the verb does not read is an error; files may serve several verbs. "
        "`precompute`, `evaluate`,\n`doctor`, `export` and `pairs` with rounds take the command line "
        "of `train`. The column of verbs has those that differ\nfrom the section's.\n",
    ]
    # Repetitions: these have the keys of data.train[] and of loss.options.
    left_out = ("data.eval[]", "evaluation.data[]", "loss.terms[].options.")
    keys = [key for key in key_rows() if not key.name.startswith(left_out)]
    sections = {name: text for name, text in section_meanings().items() if "." not in name}
    for section, meaning in sections.items():
        rows = [key for key in keys if key.name.startswith(f"{section}.")]
        verbs = Counter(key.verbs for key in rows).most_common(1)[0][0]
        parts += [f"## `{section}`\n", f"{meaning} Read by {_verbs(verbs)}.\n", _full_table(rows, verbs)]
        if notes := [f"- `{key.name}`: {rest}" for key in rows if (rest := _phrase(key.meaning)[1])]:
            parts.append("\n".join([*notes, ""]))
    return "\n".join(parts)


def _verbs(verbs: Sequence[str]) -> str:
    return "all verbs" if list(verbs) == EVERY_VERB.split() else ", ".join(verbs)


def _type(key: Key) -> str:
    kinds = {"loss.kind": "one of the [kinds](losses.md)", "loss.terms[].kind": "as `loss.kind`"}
    return kinds.get(key.name, key.type_words)


def _phrase(meaning: str) -> tuple[str, str]:
    """Return a meaning's beginning, of at most `CELL` characters, and the rest for below the table."""
    if len(meaning) <= CELL:
        return meaning, ""
    for mark in (". ", "; ", ": "):
        beginning = meaning[: CELL + 1].rpartition(mark)[0]
        if beginning:
            rest = meaning[len(beginning) + len(mark) :]
            return beginning + ("." if mark == ". " else " ..."), rest
    raise AssertionError(f"the first sentence of this meaning is too long for a cell: {meaning}")


def _full_table(keys: Iterable[Key], usual_verbs: Sequence[str]) -> str:
    heading = ("key", "type and bounds", "default", "meaning", "verbs", "digest")
    rows = (
        (
            _code(key.name),
            _type(key),
            _code(key.default_words),
            _phrase(key.meaning)[0],
            "" if key.verbs == usual_verbs else _verbs(key.verbs),
            "yes" if key.defines_result else "-",
        )
        for key in keys
    )
    return _table(heading, rows)


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text)
