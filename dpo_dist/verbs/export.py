"""Write a checkpoint as a plain model folder: `dpo-dist export run.dir=output/run-1a2b3c4d`.

Takes the configuration of the run in `run.dir`; needs one process and no GPU. `export.checkpoint` names the
checkpoint (default: the one in `model/`), `export.output` the folder, which transformers loads, or peft if
it is an adapter. `export.merge=true` adds an adapter to its base. `export.push_to=ORG/NAME` sends the folder
to the hub, also one that an earlier export wrote. `--check` says what would be written and sent.
"""

import os
import sys
from pathlib import Path

from dpo_dist.config.command_line import run_verb
from dpo_dist.config.extensions import hook
from dpo_dist.config.schema import RunConfig
from dpo_dist.foundation.console import Console, console_on, warnings_off
from dpo_dist.foundation.errors import ConfigError, ExitCode, in_one_line
from dpo_dist.foundation.files import MEMO_FOLDER
from dpo_dist.foundation.text import size
from dpo_dist.foundation.types import CheckReport
from dpo_dist.model.files.manifest import check_undamaged
from dpo_dist.training.start.named_models import find_export_paths


def main(config: RunConfig) -> int:
    """Write the folder, print its path, and upload it if configured; return the exit code."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    console = console_on(sys.stderr, config.console.style)
    checkpoint, output = find_export_paths(config)
    with warnings_off():
        # Slow to import: errors above appear at once.
        from dpo_dist.training.export import export_model  # noqa: PLC0415

        is_there = output.exists()
        if is_there:
            check_undamaged(output, Path(config.reference.store) / MEMO_FOLDER)
        else:
            export_model(config, checkpoint, output, console, hook("run_card") or (lambda *_, **__: ""))
    paths = {"checkpoint": str(checkpoint), "output": str(output)}
    console.result("exported", paths, [f"{'already there' if is_there else 'written'}: {output}"])
    if config.export.push_to is not None:
        _push(output, config.export.push_to, console)
    return ExitCode.completed


def check(config: RunConfig) -> CheckReport:
    """Say what an export would write and send; the files only of a folder that is there."""
    checkpoint, output = find_export_paths(config)
    is_there = output.exists()
    facts = [("checkpoint", str(checkpoint)), ("already there" if is_there else "to write", str(output))]
    repository = config.export.push_to
    hint = ""
    if repository is not None:
        lines = _upload_lines(repository, _sizes(output))
        facts += [("to send", lines[0]), *(("", line) for line in lines[1:])]
        if not is_there:
            hint = "the files to send are listed once the folder is there: export without export.push_to"
    return CheckReport(facts, hint=hint)


def _sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each file of a folder."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def _upload_lines(repository: str, files: dict[str, int]) -> list[str]:
    lines = [f"  {name}  {size(stored)}" for name, stored in sorted(files.items())]
    return [
        f"to {repository} on the hub, private unless it exists and is public, {size(sum(files.values()))}:",
        *lines,
    ]


def _push(folder: Path, repository: str, console: Console) -> None:
    """List the files of a folder, and upload them in one commit."""
    from huggingface_hub import HfApi  # noqa: PLC0415  (slow to import)

    files = _sizes(folder)
    console.result("upload", {"repository": repository, "files": files}, _upload_lines(repository, files))
    try:
        HfApi().create_repo(repository, private=True, exist_ok=True)
        commit = HfApi().upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Model trained by dpo_dist"
        )
    except Exception as error:  # errors of HTTP clients have no common class
        raise ConfigError(
            "the model cannot be uploaded",
            where="export.push_to",
            got=f"{repository}: {in_one_line(error)}",
            expected="a login with a token that may write there, and the network",
            remedy="run `hf auth login`, unset HF_HUB_OFFLINE, and repeat the command",
        ) from error
    console.say(f"sent: {commit.commit_url}")


if __name__ == "__main__":
    run_verb(main, check, verb="export")
