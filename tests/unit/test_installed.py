"""What an installation has: the pages that texts name, the presets of a wheel, the packages of extras."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from dpo_dist.config.command_line import explain
from dpo_dist.config.keys import group_folders
from dpo_dist.foundation import installed
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.installed import install_extra, pages, with_pages
from tests.support.launch import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = [path for kind in ("py", "yaml", "jinja", "js") for path in (ROOT / "dpo_dist").rglob(f"*.{kind}")]
FOLDERS = (".ci", "benchmarks", "conf", "docs", "dpo_dist", "examples", "launch", "pages", "scripts")
FROM_AN_INDEX = re.compile(
    r"(install|add|uvx|--with|--from)\s[^\n#`]*?(?<![\w/.~])dpo[-_]dist\b(?![/.]|'s)|(?<!/)\bdpo[-_]dist\[[a-z]"
)
TEXTS = "\n".join(path.read_text() for path in SOURCES)


def test_every_page_that_a_text_names_is_there() -> None:
    named = set(re.findall(r"\bdocs/(\w+\.md)\b", TEXTS))
    assert len(named) > 5
    assert [name for name in named if not (pages() / name).is_file()] == []


def test_an_error_and_help_name_the_file_of_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = ConfigError("wrong", remedy="docs/data.md explains it", got="docs/data.md")
    assert error.remedy == "docs/data.md explains it", "in the checkout"
    monkeypatch.chdir(tmp_path)
    error = ConfigError("wrong", remedy="docs/data.md explains it", got="docs/data.md")
    assert error.remedy == f"{ROOT}/docs/data.md explains it"
    assert error.got == "docs/data.md", "what the user wrote"
    assert with_pages("their/docs/data.md, docs/data.mdx") == "their/docs/data.md, docs/data.mdx"
    assert with_pages("delete docs/my_pairs.md") == "delete docs/my_pairs.md", "a file of the user's"
    assert f"({ROOT}/docs/scaling.md)" in with_pages(explain("trainer.prefix_tree", group_folders()))
    tmp_path.rmdir()
    assert f"{ROOT}/docs/" in ConfigError("wrong", remedy="docs/data.md").remedy, "the folder is gone"


@pytest.mark.parametrize("extra", PROJECT["project"]["optional-dependencies"])
def test_an_extra_is_installed_by_its_packages(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `dpo-dist[extra]` is in no index."""
    every = PROJECT["project"]["optional-dependencies"]
    requirements = [f"{package}; extra == '{name}'" for name in every for package in every[name]]
    monkeypatch.setattr(installed.metadata, "requires", lambda _: ["torch>=2.11", *requirements])
    words = install_extra(extra).replace("'", "").split()
    assert words == ["pip", "install", *every[extra]]


def test_no_file_installs_a_package_that_no_index_has() -> None:
    """Whoever registers its name would be installed; a checkout's form is `CHECKOUT[extra]`."""
    wrong = [
        "pip install dpo_dist",
        "uv add 'dpo-dist[trl]'",
        "dpo_dist[judge] @ url",
        "pip install -U dpo-dist",
    ]
    right = ["pip install '/a/dpo_dist[trl]'", "pip install 'CHECKOUT[trl]'", "pip install -c ~/dpo-dist ."]
    assert [line for line in wrong + right if FROM_AN_INDEX.search(line)] == wrong
    files = [*ROOT.glob("*"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*"))]
    texts = {
        file: file.read_bytes().decode(errors="replace")
        for file in files
        if file.is_file() and file.suffix != ".pyc"
    }
    assert len(texts) > 300
    assert [file for file, text in texts.items() if FROM_AN_INDEX.search(text)] == []


def test_errors_name_extras_that_there_are() -> None:
    named = set(re.findall(r"""install_extra\(["'](\w+)""", TEXTS))
    assert {"cloud", "judge"} <= named <= PROJECT["project"]["optional-dependencies"].keys()


def test_a_wheel_has_all_presets_but_those_that_need_the_demos_files() -> None:
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    presets = {file.relative_to(ROOT) for file in (ROOT / "conf").rglob("*.yaml")}
    of_demo = {file for file in presets if "${run.root}/" in (ROOT / file).read_text()}
    shipped = {file for file in presets for given in included if file.is_relative_to(given)}
    assert shipped == presets - of_demo
    assert {file.stem for file in of_demo} == {"demo", "demo_warmup", "demo_rounds", "smollm2"}


def test_the_description_in_an_index_has_no_links_to_files() -> None:
    assert not re.search(r"\]\(|<img|docs/", PROJECT["project"]["readme"]["text"])
