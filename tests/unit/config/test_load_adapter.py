"""The keys of adapters and quantization: typed, strict, and refused where they would have no effect."""

import pytest

from dpo_dist.config.identity import differing_keys, run_digest
from dpo_dist.config.load import from_yaml, load_run_config, to_yaml
from dpo_dist.config.schema import AdapterConfig, AdapterVariant, ReferenceMode, RunConfig

BASIC = ["model.path=m", "data.train=[p.jsonl]"]
ADAPTER = "model.adapter={r: 8, alpha: 32}"


def test_an_adapter_is_typed_and_survives_being_written() -> None:
    config = load_run_config(
        [*BASIC, "model.adapter={r: 8, alpha: 4, variant: dora, target_modules: [q_proj]}"]
    )
    wanted = AdapterConfig(8, 4.0, target_modules=["q_proj"], variant=AdapterVariant.dora)
    assert config.model.adapter == wanted
    assert from_yaml(to_yaml(config)) == config


def test_keys_of_an_adapter_can_be_given_one_by_one() -> None:
    config = load_run_config([*BASIC, "model.adapter.r=8", "model.adapter.target_modules=[q_proj]"])
    assert config.model.adapter == AdapterConfig(8, target_modules=["q_proj"])


def test_a_run_has_no_adapter_unless_it_says_so() -> None:
    assert load_run_config(BASIC).model.adapter is None


@pytest.mark.parametrize(
    "other",
    ["{r: 9, alpha: 32}", "{r: 8, alpha: 32, variant: rslora}", "{r: 8, alpha: 32, target_modules: [k]}"],
)
def test_the_adapter_defines_the_run(other: str) -> None:
    digests = {
        run_digest(load_run_config([*BASIC, *more])) for more in ([], [ADAPTER], [f"model.adapter={other}"])
    }
    assert len(digests) == 3


def test_null_is_a_default_or_the_value_of_the_adapter_that_is_continued() -> None:
    """In a new adapter null is the default, with the digest that it has when it is written."""

    def load(adapter: str) -> RunConfig:
        return load_run_config([*BASIC, f"model.adapter={adapter}"])

    written = load("{r: 16, alpha: 32, target_modules: all-linear, variant: lora, modules_to_save: []}")
    assert load("{r: null}").model.adapter == written.model.adapter
    assert load("{path: sft, on_top: true}").model.adapter.alpha == 32.0
    continued, named = load("{path: sft}"), load("{path: sft, r: 16}")
    assert (continued.model.adapter.r, continued.model.adapter.variant) == (None, None)
    assert named.model.adapter.r == 16
    assert from_yaml(to_yaml(continued)) == continued
    assert run_digest(continued) == run_digest(named)
    assert differing_keys(continued, named) == {}


def test_the_experiment_is_what_its_docs_say_and_can_be_overridden() -> None:
    config = load_run_config(["+experiment=qwen7b_lora", "model.adapter.variant=dora"])
    assert config.model.adapter == AdapterConfig(64, 128.0, variant=AdapterVariant.dora)
    assert config.reference.mode is ReferenceMode.adapter
    assert (config.optim.lr, config.trainer.global_batch_pairs, config.trainer.epochs) == (5e-6, 16, 2)
    assert (config.loss.beta, config.data.max_length) == (0.1, 2048)
