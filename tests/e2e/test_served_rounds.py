"""Rounds whose responses come from a server: it gets the new weights, and a stale one is refused."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from dpo_dist.config.load import load_run_config
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.tools.pairs.rounds import run_rounds
from tests.support.completions_server import CompletionsServer, completions_server
from tests.support.invented import write_pairs
from tests.support.launch import constants, run_verb
from tests.support.tiny_model import write_model

BRIEF = constants(
    **{
        "dpo_dist.tools.sampling.served.CHECKED": 6,
        "dpo_dist.tools.sampling.served.CHECK_TOKENS": 8,
        "dpo_dist.tools.sampling.client.RETRIES": 0,
    }
)
RELOAD = (
    "import json, sys, urllib.request as web; "
    "body = json.dumps({'model': sys.argv[2]}).encode(); "
    "web.urlopen(web.Request(sys.argv[1].replace('/v1', '/reload'), body))"
)
output: list[str] = []


def warm(command: str) -> int:
    words = shlex.split(command)
    ended = run_verb(words[3], words[4:], prepare=BRIEF)
    output.append(ended.output)
    return ended.code


def test_a_server_gets_each_round_s_weights_and_a_stale_one_is_an_error(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_pairs(tmp_path / "prompts.jsonl", 6)
    with completions_server(CompletionsServer(tmp_path / "model")) as server:
        overrides = shlex.split(
            f"model.path={tmp_path}/model model.dtype=fp32 data.train=[{tmp_path}/prompts.jsonl] "
            f"run.dir={tmp_path}/run reference.store={tmp_path}/store data.cache={tmp_path}/encoded "
            "pairs.method=samples pairs.function=tests.support.own_judge:letter_shares pairs.rounds=1 "
            "sampling.max_new_tokens=6 pairs.unfinished=keep pairs.samples=3 "
            "optim.lr=2e-2 trainer.global_batch_pairs=6 trainer.epochs=2 trainer.save_every=0 "
            f"parallelism=ddp tracking=off sampling.endpoint.url={server.url} sampling.endpoint.model=policy"
        )
        said: list[str] = []
        # Nobody gives the server the weights of the first round.
        with pytest.raises(ConfigError, match="the sampling of round 2 failed"):
            run_rounds(load_run_config(overrides), said.append, warm)
        assert "it probably serves other weights" in output[-1]
        assert not list((tmp_path / "run/rounds/2").glob("pairs/parts/*"))
        assert server.folder == tmp_path / "model"
        command = shlex.join([sys.executable, "-c", RELOAD, server.url, "{model}"])
        again = [*overrides, f"sampling.endpoint.reload={json.dumps(command)}"]
        assert run_rounds(load_run_config(again), said.append, warm) == 0, output[-1]
        assert server.folder == tmp_path / "run/rounds/1/train/model"
    rounds = json.loads((tmp_path / "run/rounds/rounds.json").read_text())["rounds"]
    assert [row["samples"]["responses"] for row in rounds] == [18, 18]


def test_compared_models_respond_under_their_names(tmp_path: Path) -> None:
    folders = {name: write_model(tmp_path / name, seed=seed) for seed, name in enumerate(("base", "tuned"))}
    write_pairs(tmp_path / "prompts.jsonl", 4)
    with completions_server(CompletionsServer(folders["base"], name="base")) as server:
        server.others["tuned"] = folders["tuned"]
        overrides = shlex.split(
            f"compare.models=[base={folders['base']},tuned={folders['tuned']}] model.dtype=fp32 "
            f"data.eval=[{tmp_path}/prompts.jsonl] run.dir={tmp_path}/run sampling.max_new_tokens=6 "
            f"reference.store={tmp_path}/store sampling.endpoint.url={server.url} sampling.prompts=4"
        )
        ended = run_verb("compare", overrides, prepare=BRIEF)
        assert ended.code == 0, ended.output
        server.others["tuned"] = folders["base"]
        stale = run_verb("compare", [*overrides, f"run.dir={tmp_path}/again"], prepare=BRIEF)
        assert stale.code == 2
        assert "tuned at" in stale.output
    answers = [
        json.loads(line) for line in (tmp_path / "run/comparison/answers.jsonl").read_text().splitlines()
    ]
    assert len(answers) == 4
    texts = {answer["responses"][name]["text"] for answer in answers for name in folders}
    assert len(texts) > 4
