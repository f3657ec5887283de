"""The benchmarks run and print their figures; no test depends on the speed of this machine."""

import json
from typing import Any

from tests.support.warm_benchmarks import run_benchmark


def figures(name: str, *options: str, with_trl: bool = False) -> Any:
    """Run a benchmark in its smallest form."""
    code, output, errors = run_benchmark(name, "--smoke", *options, seconds=900, with_trl=with_trl)
    assert code == 0, errors
    return json.loads(output.splitlines()[-1])


def test_both_trainers_take_the_same_first_step() -> None:
    options = ("--processes", "2", "--trl-best-micro-pairs", "2")
    measured = figures("vs_trl", *options, with_trl=True)
    assert measured["trainers_agree"]
    assert max(measured["first_step_difference"].values()) <= 1e-4
    for ours in ("cold", "warm", "cold_2", "warm_2"):
        for trl in ("trl_default", "trl_best_2"):
            for quantity in ("seconds", "cpu_seconds", "peak_memory"):
                median, least, most = measured["ratios"][f"{ours}/{trl}/{quantity}"]
                assert 0 < least <= median <= most


def test_only_a_live_reference_takes_memory_while_the_policy_trains() -> None:
    [measured] = figures("memory").values()
    cold, warm, live = (of_mode["kept"] for of_mode in measured.values())
    # The model that filled the store is freed before training starts.
    assert cold < 0.1 * live
    assert warm < 0.1 * live


def test_a_variant_of_training_is_measured() -> None:
    measured = figures("mfu", "--variants", "plain", "--steps", "2")["variants"]["plain"]
    assert measured["mfu"] > 0
    assert len(measured["loss"]) == 1


def test_encoding_writes_the_same_on_any_number_of_processes() -> None:
    measured = figures("encode", "--records", "40", "--processes", "1", "2")
    assert [figure["processes"] for figure in measured["figures"]] == [1, 2]


def test_a_tree_computes_fewer_tokens_of_agents() -> None:
    measured = figures("prefixes")["agents"]
    assert measured["tree"] < measured["shared prompts"] < measured["rows"]


def test_starts_find_the_generated_records_and_their_log_probs() -> None:
    starts = figures("starts")["labelled"]["1"]
    assert list(starts) == ["first", "resume", "again"]
    assert all(rows["100"][figure] > 0 for rows in starts.values() for figure in rows["100"])


def test_a_script_of_trl_by_our_import_has_its_first_loss() -> None:
    measured = figures("trl_guest", with_trl=True)
    assert measured["trainers_agree"]
    assert measured["trl_per_variant"].keys() == {"guest", "guest_beta", "dpo_dist"}
