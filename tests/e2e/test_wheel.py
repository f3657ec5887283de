"""The wheel, in an environment that does not see the checkout: its verbs run, and it has the presets."""

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.support.launch import ROOT, environment

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def test_the_wheel_trains_reports_and_lists_its_presets(assets: Path, tmp_path: Path) -> None:
    variables = {k: value for k, value in environment().items() if k != "PYTHONPATH"}

    def run(*words: object, env: dict[str, str] = variables) -> str:
        command = [str(word) for word in words]
        ended = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout + ended.stderr

    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path)
    run(*PIP, "wheel", *options, ROOT, env=environment())
    (wheel,) = tmp_path.glob("dpo_dist-*.whl")
    installed = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", installed)
    python = installed / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # Packages of this environment are seen, the checkout is not: .pth files there are not read.
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib"))
    run(*PIP, "--python", python, "install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", wheel)

    verb = installed / "bin" / "dpo-dist"
    assert run(python, "-c", "import dpo_dist; print(dpo_dist.__file__)").startswith(str(packages))
    presets = run(verb, "train", "--help")
    assert "simpo" in presets
    assert "qwen7b" in presets
    agents = re.search(r"pages: (.*);", run(verb, "--help"))
    assert agents is not None
    assert Path(agents[1], "agents.md").read_text().startswith("# For coding agents")
    assert "demo_warmup" not in presets
    page = re.search(r"\((.*/docs/scaling\.md)\)", run(verb, "train", "--help", "trainer.prefix_tree"))
    assert page is not None
    assert (tmp_path / page[1]).is_relative_to(packages)
    assert (tmp_path / page[1]).is_file()
    (described,) = packages.glob("dpo_dist-*/METADATA")
    assert not re.search(r"\]\((?!https://)", described.read_text())
    model, pairs = f"model.path={assets}/model", f"data.train=[{assets}/train.jsonl]"
    small = ("model.dtype=fp32", "parallelism=ddp", "trainer.global_batch_pairs=4", "trainer.max_steps=2")
    run(verb, "train", model, pairs, *small, "tracking=off", "run.dir=run")
    report = tmp_path / "run" / "report.html"
    report.unlink()
    run(verb, "report", "run")
    assert "</html>" in report.read_text()
