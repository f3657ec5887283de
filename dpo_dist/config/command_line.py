"""Run a verb with the configuration on its command line; print `--help`; write a verb's command."""

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import dpo_dist
from dpo_dist.config.compose import parse_overrides
from dpo_dist.config.extensions import ask
from dpo_dist.config.keys import (
    FIRST_KEYS,
    Key,
    all_keys,
    group_folders,
    is_within,
    key_rows,
    preset_names,
    presets_of,
    run_keys,
    section_meanings,
    strip_indices,
    to_choose,
    verb_keys,
)
from dpo_dist.config.load import load_run_config, read_saved, to_yaml
from dpo_dist.config.losses import KINDS, kinds_using
from dpo_dist.config.mistakes import assigned, did_you_mean, instead_of_key, nearest, unknown_key
from dpo_dist.config.named_code import COMMAND, code_warnings
from dpo_dist.config.run_folder import existing_run
from dpo_dist.config.schema import SCHEMA, ZERO_STAGES, ConsoleStyle, Dtype, ParallelismConfig, RunConfig
from dpo_dist.config.verbs import VERBS
from dpo_dist.foundation.console import console_on, warnings_off
from dpo_dist.foundation.errors import Arguments, ConfigError, ErrorPrinter, ExitCode, exit_after
from dpo_dist.foundation.files import write_text
from dpo_dist.foundation.installed import with_pages
from dpo_dist.foundation.process import check_launch, this_rank
from dpo_dist.foundation.remedies import COMMAND_LINE, Typed
from dpo_dist.foundation.streams import print_result, printable_lines, reserve_output
from dpo_dist.foundation.text import without_secrets
from dpo_dist.foundation.types import CheckReport

_EXIT_CODES = """exit codes: 0 completed, 1 bug or findings of the doctor, 2 configuration or data error,
3 diverged; the same command resumes after 69 lost process, 75 stopped with a checkpoint"""


def _parser(**texts: Any) -> Arguments:
    parser = Arguments(**{"add_help": False, "allow_abbrev": False, "usage": argparse.SUPPRESS, **texts})
    one_of = parser.add_mutually_exclusive_group()
    one_of.add_argument(
        "-h",
        "--help",
        nargs="?",
        const="",
        metavar="KEY",
        help="print this text, or explain a section or key",
    )
    one_of.add_argument("--version", action="store_true", help="print the version of dpo_dist")
    one_of.add_argument(
        "--check",
        action="store_true",
        help="check values, model, tokenizer, data, folders without a GPU, if the verb has such a check",
    )
    one_of.add_argument(
        "-c",
        "--cfg",
        choices=("job", "schema"),
        help="print the resolved configuration of the run, or the JSON schema of files of keys, and exit",
    )
    parser.add_argument(
        "-cd",
        "--config-dir",
        type=_folder,
        metavar="DIR",
        help="add your own presets and experiments: DIR/experiment/NAME.yaml",
    )
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="start N processes; without it one for each GPU, or as many as the launcher or SLURM starts",
    )
    return parser


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(
            f"{text} is not a folder; paths are relative to the working directory"
        )
    return Path(text)


def split_words(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line, its other `words`, and `mistakes`: unknown options."""
    options, rest = _parser().parse_known_args(arguments)
    options.words = []
    options.mistakes = []
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            options.words.append(word)
            continue
        values = []
        # A switch, as of another trainer, does not take the file that follows; `--config` does.
        others = "^-|=" if "config" in word else r"^-|=|\.ya?ml$"
        while "=" not in word and rest and not re.search(others, rest[0]):
            values.append(rest.pop(0))
        options.mistakes.append(_unknown_option(word, values))
    if options.processes is not None:  # `dpo-dist VERB` takes it out of the command
        remedy = (
            "remove it, or start the verb by dpo-dist VERB --processes N, outside of a launcher's process"
        )
        mistake = ConfigError("--processes has no effect here", where=Typed("--processes"), remedy=remedy)
        options.mistakes.append(mistake)
    return options


def _unknown_option(word: str, values: Sequence[str]) -> ConfigError:
    """Return the error for an option that a verb does not have; other programs write keys as options."""
    name, _, value = word.partition("=")
    text = value or ",".join(values)
    key = name.lstrip("-").replace("-", "_")
    overrides, _ = parse_overrides([f"{key}=[{text}]" if len(values) > 1 else f"{key}={text or 'true'}"])
    typed = overrides[0].value() if overrides else text
    near = nearest(name, re.findall(r"--[\w-]+", _parser().format_help()))
    if key in run_keys():
        near = assigned([key], typed)
    remedy = ask("advice", key, text) or (did_you_mean(near) if near else instead_of_key(key, typed))
    return ConfigError(f"there is no option {name}", where=Typed(word, *values), remedy=remedy)


def saved_values(options: argparse.Namespace, verb: str = "evaluate") -> dict[str, Any] | None:
    """Return the values of config.yaml in `run.dir`, for a command that names only its run.

    None if the command sets `model.path` (for the doctor: `data.train`), has a model preset, an experiment, a
    file or `--config-dir`, or if the run has no config.yaml.
    """
    folder = _named_run(options, {"model", VERBS[verb].needs[0]})
    file = None if folder is None else existing_run(folder).config
    if file is None or not file.is_file():
        return None
    values = read_saved(file)
    section, _, name = COMMAND.partition(".")
    if isinstance(values.get(section), dict):
        values[section].pop(name, None)  # of training alone: no verb that reads a saved configuration runs it
    return values


def _named_run(options: argparse.Namespace, needed: Collection[str]) -> Path | None:
    """Return `run.dir` of a command without a file, an experiment and the keys `needed`; None for others."""
    overrides, _ = parse_overrides(word for word in options.words if "=" in word)
    values = {override.key_or_group: override.value() for override in overrides}
    has_file = options.config_dir is not None or any("=" not in word for word in options.words)
    is_whole = has_file or not {"experiment", *needed}.isdisjoint(values)
    return None if is_whole or "run.dir" not in values else Path(str(values["run.dir"])).expanduser()


def usage(command: str, about: str, keys: Collection[str], folders: Sequence[Path]) -> str:
    """Return a verb's `--help`: `about`, then the sections and presets of the keys that it reads."""
    top_sections = (name for name in section_meanings() if "." not in name)
    sections = {name: section_meanings()[name] for name in top_sections if name in keys}
    presets = presets_of(keys, folders)
    first = [(name, all_keys()[name].meaning.split(". ")[0]) for name in FIRST_KEYS if name in keys]
    text = [
        about.strip(),
        *(["\nmost used keys:", *_columns(first)] if first else []),
        "\nsections (--help SECTION lists its keys, --help KEY explains one, e.g. --help loss.beta):",
        *_columns(sections.items()),
        "\npresets (GROUP=PRESET, +experiment=NAME):",
        *(f"  {group}: {', '.join(names)}" for group, names in presets.items() if names),
    ]
    return _parser(
        usage=f"{command} [FILE.yaml ...] [KEY=VALUE ...] [GROUP=PRESET ...] [+experiment=NAME] [OPTION ...]",
        description="\n".join(text).replace("%", "%%"),
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).format_help()


def explain(key: str, folders: Sequence[Path]) -> str:
    """Return the text of `--help KEY`: `loss.beta`, `loss`, `data.train.weight`, a group of presets."""
    name = strip_indices(key.removeprefix("+")).replace("[]", "")
    here = list[Key]()
    below = list[Key]()
    for row in key_rows():
        full = row.name.replace("[]", "")
        if full == name:
            here.append(row)
        elif is_within(full, name):
            below.append(row)
    presets = preset_names(name, folders) if re.fullmatch(r"\w+", name) else []
    if not (here or below or presets):
        raise unknown_key(key)
    lines = [] if here else [f"{name}: {section_meanings().get(name, 'a group of presets')}"]
    for row in here:
        lines += _facts(row)
    if below:
        options = [(row.name, f"{row.meaning} ({row.default_words or 'must be set'})") for row in below]
        lines += ["", f"keys of {name} (default):", *_columns(options)]
    if presets:
        lines += ["", f"presets: {to_choose(name, '|'.join(presets))}"]
    return "\n".join(lines) + "\n"


def _facts(row: Key) -> list[str]:
    digest = "not part of the run's digest: a run can be resumed with another value"
    if row.defines_result:
        digest = "part of the run's digest: another value is another run"
    facts = {
        "meaning": row.meaning,
        "type": row.type_words,
        "default": row.default_words or "none, it must be set",
        "verbs": ", ".join(row.verbs),
        "digest": digest,
    }
    declaring = [kind for kind in KINDS if KINDS[kind].options is row.declared_in]
    kinds = declaring or kinds_using(row.name.removeprefix("loss."))
    if kinds:
        facts["kinds"] = "all" if len(kinds) == len(KINDS) else ", ".join(kinds)
    return [row.name, *(f"  {label + ':':<10}{text}" for label, text in facts.items())]


def _columns(lines: Collection[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in lines)
    return [f"  {name:<{width}}  {text}" for name, text in lines]


_Points: TypeAlias = Mapping[tuple[str, ...], RunConfig]


def run_verb(
    main: Callable[[Any], int],
    check: Callable[[Any], CheckReport] | None = None,
    *,
    verb: str = "train",
    load_points: Callable[..., _Points] | None = None,
) -> NoReturn:
    """Call `main` with the command line's configuration, or with the points that `load_points` makes of it;
    exit with its exit code.

    `check` returns what `--check` prints, on rank 0 only. `--help` prints the docstring of `main`'s module.
    """
    styles = [word.lstrip("+") for word in sys.argv[1:] if word.lstrip("+").startswith("console.style=")]
    errors = ErrorPrinter(styles[-1:] == [f"console.style={ConsoleStyle.json}"], this_rank())
    exit_after(lambda: _run(main, check, verb, load_points, errors), errors)


def _run(
    main: Callable[[Any], int],
    check: Callable[[Any], CheckReport] | None,
    verb: str,
    load_points: Callable[..., _Points] | None,
    errors: ErrorPrinter,
) -> int:
    options = split_words(sys.argv[1:])
    text = _option_text(options, verb, sys.modules[main.__module__].__doc__ or "")
    if text is None:
        words = options.words
        folder = options.config_dir
        mistakes = options.mistakes
        points: _Points
        if load_points is not None:
            points = load_points(words, folder, mistakes=mistakes)
        else:
            saved = saved_values(options, verb) if VERBS[verb].reuses_config else None
            points = {(): load_run_config(words, folder, verb=verb, saved=saved, mistakes=mistakes)}
        config = next(iter(points.values()))
        text = "---\n".join(map(to_yaml, points.values())) if options.cfg else None
    if text is not None:
        if this_rank() == 0:
            print_result(text)
        return ExitCode.completed
    errors.is_json = config.console.style is ConsoleStyle.json
    if errors.is_json:
        reserve_output()
    check_launch(os.environ, _repeated(config.parallelism, config.model.dtype, config.optim.max_grad_norm))
    if this_rank() == 0:
        lines = without_secrets(code_warnings(asdict(config)))
        sys.stderr.write("".join(f"{printable_lines(line)}\n" for line in lines))
    if VERBS[verb].is_one_process and this_rank() > 0:
        return ExitCode.completed
    configured = config if load_points is None else points
    if not options.check:
        return main(configured)
    if check is None:
        raise ConfigError("this verb has no --check", where=COMMAND_LINE, remedy="remove --check")
    if this_rank() == 0:
        with warnings_off():
            report = check(configured)
            console = console_on(sys.stdout, config.console.style)
            console.result("check", report.as_dict(), str(report).splitlines())
    return ExitCode.completed


def _repeated(
    parallelism: ParallelismConfig, dtype: Dtype, max_grad_norm: float | None
) -> dict[str, tuple[str, str]]:
    """Map each variable of accelerate that repeats a key to this key and its value, for `check_launch`."""
    kind = parallelism.kind
    deepspeed = "ACCELERATE_DEEPSPEED_"
    optimizer = parallelism.offload_optimizer
    weights = parallelism.offload_parameters
    return {
        f"{deepspeed}CONFIG_FILE": ("parallelism.kind", ""),
        "ACCELERATE_USE_FSDP": ("parallelism.kind", ""),
        "ACCELERATE_DYNAMO_BACKEND": ("model.fused", ""),
        "ACCELERATE_MIXED_PRECISION": ("model.dtype", dtype),
        f"{deepspeed}ZERO_STAGE": ("parallelism.kind", str(ZERO_STAGES[kind])),
        f"{deepspeed}OFFLOAD_OPTIMIZER_DEVICE": ("parallelism.offload_optimizer", optimizer),
        f"{deepspeed}OFFLOAD_PARAM_DEVICE": ("parallelism.offload_parameters", weights),
        "ACCELERATE_GRADIENT_CLIPPING": ("optim.max_grad_norm", str(max_grad_norm)),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("trainer.global_batch_pairs", "1"),
    }


def _option_text(options: argparse.Namespace, verb: str, about: str) -> str | None:
    """Return the text that an option without a configuration prints; None if no such option is given."""
    if options.version:
        return f"dpo_dist {dpo_dist.__version__}\n"
    if options.cfg == "schema":
        return json.dumps(file_schema(group_folders(options.config_dir)), indent=1) + "\n"
    if options.help is None:
        return None
    folders = group_folders(options.config_dir)
    keys = verb_keys(verb, trains=verb == "pairs")
    if options.help:
        return with_pages(explain(options.help, folders))
    command = f"dpo-dist {verb}" if VERBS[verb].is_one_process else f"dpo-dist [launch] {verb}"
    return with_pages(usage(command, about, keys, folders))


def file_schema(folders: Sequence[Path]) -> dict[str, Any]:
    """Return the JSON schema of a file of keys, which may also have `loss: ipo`.

    It has the names of keys such as `loss.beta: 0.2`, and the values of those that are written in sections.
    """
    schema = SCHEMA.json_schema()
    for section, value in [*schema["properties"].items()]:
        names = preset_names(section, folders)
        # YAML of version 1.1 reads a bare `off` as false; null is a section without keys.
        presets: list[Any] = [*names, *[False] * ("off" in names), None]
        schema["properties"][section] = {"anyOf": [value, {"enum": presets}]}
    schema["properties"] |= {name: {} for name in run_keys() if "." in name}
    schema["properties"]["defaults"] = {"type": ["array", "string"], "description": "Presets, as in Hydra."}
    schema["patternProperties"] = {r"^loss\.options(\.|$)": {}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def write_command(verb: str, config: RunConfig, folder: Path, launcher: str) -> str:
    """Write `config`, without secrets, below `folder`; return the command that runs the verb with it.

    The file is experiment/round.yaml, for a point of a sweep as for a round of `pairs`.
    """
    write_text(folder / "experiment" / "round.yaml", f"# @package _global_\n{to_yaml(config)}")
    return f"{launcher} -m dpo_dist {verb} --config-dir {shlex.quote(str(folder))} +experiment=round"
