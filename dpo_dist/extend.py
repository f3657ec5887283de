"""Add tokens to a model's vocabulary: `python -m dpo_dist.extend MODEL FOLDER --tokens '<|user|>' '<|end|>'`.

Writes a model folder whose embeddings and output layer have a row for each token, to train as `model.path`.
Only chat templates write special tokens: a text that spells one is encoded as text. Texts contain the tokens
of `--content-tokens`. With `--tokenizer` the tokens are those of another tokenizer, such as one beside an
adapter.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dpo_dist.config.schema import ModelConfig
from dpo_dist.foundation.errors import ConfigError, DpoDistError, ExitCode
from dpo_dist.foundation.streams import open_closed_streams, print_line
from dpo_dist.model.folder import check_weights, has_tokenizer, model_folder, weight_files


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: sys.argv); return the exit code."""
    open_closed_streams()
    given = _parser().parse_args(arguments)
    try:
        _extend(given)
    except DpoDistError as error:
        print_line(error.block(), sys.stderr)
        return error.exit_code
    return ExitCode.completed


def _extend(given: argparse.Namespace) -> None:
    """Write the folder and print its sizes.

    Raises:
        DpoDistError: the model cannot be read, or the folder cannot be written.
    """
    folder = given.folder.expanduser()
    if os.path.lexists(folder):
        raise ConfigError(
            "the folder to write exists",
            where="FOLDER",
            got=str(folder),
            remedy="name another folder, or delete this one",
        )
    base = model_folder(given.model, given.revision, "MODEL")
    check_weights(weight_files(base), "MODEL")
    tokenizer = None if given.tokenizer is None else given.tokenizer.expanduser()
    if tokenizer is not None and not has_tokenizer(tokenizer):
        raise ConfigError(
            "this folder has no tokenizer" if tokenizer.is_dir() else "this folder does not exist",
            where="--tokenizer",
            got=str(tokenizer),
            expected="a folder with tokenizer.json, tokenizer.model or vocab.json",
            remedy="name the folder of a tokenizer that has the new tokens",
        )
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # It warns about kernels of 4-bit weights, which nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Slow to import: errors above appear at once.
    from tokenizers import AddedToken  # noqa: PLC0415

    from dpo_dist.model.new_tokens import write_extended  # noqa: PLC0415

    config = ModelConfig(path=given.model, trust_remote_code=given.trust_remote_code)
    tokens = [AddedToken(token, special=True, normalized=False) for token in given.tokens]
    tokens += [AddedToken(token, special=False, normalized=False) for token in given.content_tokens]
    sizes = write_extended(folder, base, config, tokens, tokenizer)
    print_line(
        f"written: {folder} with {sizes.tokens:,} tokens; "
        f"embeddings of {sizes.former_rows:,} rows before, {sizes.rows:,} now"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dpo_dist.extend", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of the model")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder to write")
    parser.add_argument("--tokens", nargs="+", default=[], metavar="TOKEN", help="special tokens to add")
    of_texts = "tokens to add that prompts and responses may contain"
    parser.add_argument("--content-tokens", nargs="+", default=[], metavar="TOKEN", help=of_texts)
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="folder of another tokenizer")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of MODEL on the hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code of the model")
    return parser


if __name__ == "__main__":
    sys.exit(main())
