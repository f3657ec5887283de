"""The settings with which a model is scored."""

from dpo_dist.config.load import load_run_config
from dpo_dist.config.schema import Quantization
from dpo_dist.reference.engine import scoring_config


def test_the_reference_has_its_quantization_and_nothing_of_training() -> None:
    words = ["model.path=m", "data.train=[a.jsonl]", "model.adapter={r: 2}"]
    scored = scoring_config(load_run_config(words).model, Quantization.nf4)
    assert scored.quantization is Quantization.nf4
    assert scored.adapter is None
    assert scored.gradient_checkpointing == "none"
