"""Find the models that a command evaluates. Imports no torch."""

from dataclasses import replace
from pathlib import Path

from dpo_dist.config.run_folder import no_model_error
from dpo_dist.kit import ReferenceMode, RunConfig, RunFolder, is_checkpoint, locate_model
from dpo_dist.tools.evaluation.extension import EvaluationConfig
from dpo_dist.training.start.named_models import EVALUATION_MODEL_KEY, EvaluatedModel


def find_evaluation_models(config: RunConfig) -> tuple[RunConfig, list[EvaluatedModel]]:
    """Return the configuration and the models of the verb `evaluate`.

    The configuration has no training data. Its reference's log-probs come from the store, also if training
    computes them with `reference.mode` `live` or `adapter`: the model is the same.
    """
    data, reference = config.data, config.reference
    evaluation = config.section_of(EvaluationConfig)
    if evaluation.data:
        data = replace(data, eval=evaluation.data, eval_share=0.0)
    if reference.mode in (ReferenceMode.adapter, ReferenceMode.live):
        bits = (
            config.model.quantization if reference.mode is ReferenceMode.adapter else reference.quantization
        )
        reference = replace(reference, mode=ReferenceMode.cached, quantization=bits)
    data = replace(data, train=[]) if data.eval else data
    config = replace(config, data=data, reference=reference)
    config.data.check_has_evaluation_data("evaluate models on")
    run = RunFolder(config.run.path)
    if None in evaluation.models and not run.model.is_dir():
        pairs = "its name depends on data.eval: to evaluate on other pairs, set evaluation.data"
        raise no_model_error(run, EVALUATION_MODEL_KEY, f"set run.dir to a complete run ({pairs})")
    paths = [
        locate_model(str(run.model) if model is None else model, EVALUATION_MODEL_KEY)
        for model in evaluation.models
    ]
    return config, [EvaluatedModel(path, is_checkpoint(Path(path))) for path in paths]
