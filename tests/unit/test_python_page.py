"""docs/python.md runs from top to bottom, as one notebook."""

import os
import sys
from pathlib import Path

from tests.support.invented import write_pairs
from tests.support.pages import Block, blocks_of, in_process
from tests.support.tiny_model import write_model


def notebook(folder: Path, blocks: list[Block]) -> None:
    os.chdir(folder)
    cells = {"__name__": "notebook"}
    for block in blocks:
        if block.file:
            Path(block.file).write_text(block.text)
        else:
            exec(compile(block.text, "docs/python.md", "exec"), cells)


def test_every_block_of_the_page_runs(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_pairs(tmp_path / "pairs.jsonl", 9, seed=1)
    blocks = [block for block in blocks_of("python.md") if block.language == "python"]
    assert len(blocks) == 8
    in_process(notebook, tmp_path, blocks)


def test_importing_the_package_imports_no_torch(tmp_path: Path) -> None:
    in_process(import_package)


def import_package() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("dpo_dist", "torch")]:
        del sys.modules[name]
    import dpo_dist

    assert dpo_dist.__version__
    assert "torch" not in sys.modules
