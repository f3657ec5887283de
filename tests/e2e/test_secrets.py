"""Canaries: secrets of the environment and of the command line are in no file and no process argument."""

import gzip
import io
import threading
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import small_run
from tests.support.judge_server import judge_server
from tests.support.launch import environment
from tests.support.warm import run_warm

SECRETS = {
    "WANDB_API_KEY": "0123canary" * 4,
    "HF_TOKEN": "hf_canaryOfTheHubCanary",
    "HUGGING_FACE_HUB_TOKEN": "hf_canaryOfTheOldHub",
    "OPENAI_API_KEY": "sk-canary-of-the-judge",
    "MY_SECRET": "canary-of-a-secret",
    "DB_PASSWORD": "canary-of-a-password",
    "AWS_SECRET_ACCESS_KEY": "canary/of/the/cloud",
    "AWS_SESSION_TOKEN": "canary/of/a/session",
}
TYPED = "see https://me:canary-typed@host/x?api_key=canary-query and sk-canary-typed-0123456789abcdef"


class Arguments:
    """The arguments of every process that ran meanwhile, except this test's own."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Arguments":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            for file in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    self.seen.add(file.read_bytes())
                except OSError:
                    continue


def contents(file: Path) -> Iterator[bytes]:
    """The bytes of a file, also those that it has in compressed form."""
    content = file.read_bytes()
    yield content
    if content.startswith(b"\x1f\x8b"):
        yield gzip.decompress(content)
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            yield from map(archive.read, archive.namelist())
    for start in (at for at in range(len(content) - 2) if content[at : at + 2] in (b"x\x9c", b"x\xda")):
        inflater = zlib.decompressobj()
        try:
            yield inflater.decompress(content[start:])
        except zlib.error:
            continue


@pytest.fixture(scope="module")
def written(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[bytes], str]:
    """The folder of all that the verbs wrote, the arguments of processes, and the screens."""
    folder = tmp_path_factory.mktemp("secrets")
    run = [part for part in small_run(assets, folder) if not part.startswith("tracking.wandb")]
    run.append("trainer.max_steps=2")
    evaluated = f"data.eval=[{assets}/eval.jsonl]"
    variables = {**environment(), **SECRETS, "WANDB_MODE": "offline", "TMPDIR": str(folder)}
    variables |= {"HOME": str(folder / "home"), "WANDB_DATA_DIR": str(folder / "wandb-data")}
    screens = []

    def verb(name: str, *overrides: str) -> int:
        own = run if name not in ("compare", "pairs") else [part for part in run if part.startswith("model.")]
        code, screen = run_warm(name, [*own, *overrides], variables, 1, folder, 300)
        screens.append(screen)
        return code

    def refuse(_: object) -> tuple[int, str]:
        return 401, f'{{"error": {{"message": "{SECRETS["OPENAI_API_KEY"]} is wrong"}}}}'

    noted = f"tracking.project='{TYPED} {SECRETS['MY_SECRET']}'"
    compared = [
        f"compare.models=[base={assets}/model,{folder}/exported]",
        "compare.prompts=2",
        "compare.max_new_tokens=4",
        f"run.dir={folder}/compared",
    ]
    judged = [
        f"data.train=[{assets}/train.jsonl]",
        "pairs.method=samples",
        "pairs.max_new_tokens=4",
        "pairs.endpoint.model=judge",
        "pairs.limit=2",
        "pairs.unfinished=keep",
    ]
    longer = evaluated, "trainer.max_steps=3"
    with Arguments() as arguments, judge_server(refuse) as server:
        codes = [
            verb("precompute", noted),
            verb("doctor", noted, f"run.dir={folder}/doctor"),
            verb("train", evaluated, "tracking.wandb=offline", noted),
            verb("evaluate", evaluated),
            verb("export", noted, evaluated, f"export.output={folder}/exported"),
            verb("compare", evaluated, *compared),
            verb("train", noted, f"[{SECRETS['MY_SECRET']}"),
            verb("train", noted, f"loss.beta={SECRETS['MY_SECRET']}"),
            verb("train", noted, "--cfg", "job"),
            verb("pairs", *judged, f"pairs.endpoint.url={server.url}", f"run.dir={folder}/pairs"),
            verb("train", "optim.lr=1e30", f"run.dir={folder}/failed", "tracking.wandb=offline", *longer),
        ]
    assert codes == [0, 0, 0, 0, 0, 0, 2, 2, 0, 2, 3], screens
    assert server.headers, screens[-2]
    return folder, arguments.seen, "".join(screens)


def test_no_file_has_a_secret(written: tuple[Path, set[bytes], str]) -> None:
    folder, _, _ = written
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    assert any("wandb" in str(file) and file.suffix == ".wandb" for file in files)
    found = [
        f"{file.relative_to(folder)}: {name}"
        for file in files
        for content in contents(file)
        for name, secret in {**SECRETS, "typed": "canary-typed", "query": "canary-query"}.items()
        if secret.encode() in content
    ]
    assert sorted(set(found)) == []


def test_no_screen_and_no_argument_of_a_process_has_a_secret(written: tuple[Path, set[bytes], str]) -> None:
    _, arguments, screens = written
    for name, secret in SECRETS.items():
        assert secret not in screens, name
        assert not [line for line in arguments if secret.encode() in line], name
