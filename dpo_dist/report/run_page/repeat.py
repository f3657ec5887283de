"""Section about repeating the run, and its folded configuration and environment."""

from collections.abc import Iterator
from html import escape

from dpo_dist.config.run_folder import LAST_EVALUATION
from dpo_dist.report.blocks import facts_table, flat, folded, note, section, text
from dpo_dist.report.inert import inert_html
from dpo_dist.report.run_page.facts import Fields, PageFacts

_HIGHLIGHTS = (
    "model.path",
    "model.revision",
    "model.dtype",
    "model.adapter",
    "model.quantization",
    "data.train",
    "data.eval",
    "data.max_length",
    "loss.kind",
    "loss.beta",
    "loss.terms",
    "reference.mode",
    "reference.path",
    "optim.lr",
    "optim.schedule",
    "trainer.global_batch_pairs",
    "trainer.epochs",
    "trainer.max_steps",
    "trainer.seed",
    "parallelism.kind",
)
_DIGESTS = {
    "run_digest": "configuration",
    "data": "training data",
    "eval_data": "evaluation data",
    "model": "model",
    "reference": "reference model",
}
_ADVICE = (
    "From the same folder this command gives the same run, if commit, versions and data are the same; in an "
    "empty run.dir, as it resumes or completes an existing one."
)


def repeat_section(facts: PageFacts) -> str:
    """Return command, commit, digests and versions of the run; empty without any."""
    command = facts.environment.get("command")
    shown = f"<pre>{inert_html(str(command))}</pre>" if command else ""
    origins = facts_table(_origins(facts))
    return section("repeat", "Repeat this run", shown, note(_ADVICE) if command else "", origins)


def _origins(facts: PageFacts) -> Iterator[tuple[str, str]]:
    environment = facts.environment
    commit = environment.get("git_commit")
    if commit:
        changed = environment.get("git_changed_files")
        edits = f", with {changed:,} changed files" if changed else ""
        yield "commit", f"{commit}{edits}"
    identity: Fields = facts.state.get("identity") or {}
    for key, name in _DIGESTS.items():
        if identity.get(key):
            yield f"digest of the {name}", str(identity[key])
    packages: Fields = environment.get("packages") or {}
    if packages:
        python = environment.get("python")
        versions = [f"{name} {version}" for name, version in packages.items()]
        yield "versions", ", ".join([f"python {python}", *versions] if python else versions)


def settings_sections(facts: PageFacts) -> str:
    """Return configuration and environment, folded."""
    config, environment = facts.config, facts.environment
    return (
        folded("Configuration", facts_table(_highlights(facts)))
        + folded("Complete configuration", facts_table(flat(config)))
        + folded("Environment", facts_table(flat(environment)))
    )


def _highlights(facts: PageFacts) -> Iterator[tuple[str, str]]:
    for key in _HIGHLIGHTS:
        value = facts.setting(key)
        if value not in (None, [], {}):
            yield key, text(value)


def files_section(facts: PageFacts) -> str:
    """Return the paths of the other files of the run that exist."""
    folder = facts.folder
    files = {
        "model": folder.model,
        "curves as an image": folder.curves,
        "metrics as a table": folder.metrics_table,
        "report of the doctor": folder.doctor_page,
        "scores of every pair in the last evaluation": folder.evaluation_of(LAST_EVALUATION).scores,
        "sampled responses": folder.samples,
    }
    items = "".join(
        f"<li>{escape(name)}: <code>{inert_html(str(path.relative_to(folder.path)))}</code></li>"
        for name, path in files.items()
        if path.exists()
    )
    return section("files", "Files of this run", f"<ul>{items}</ul>") if items else ""
