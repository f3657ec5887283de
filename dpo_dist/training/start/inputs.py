"""Load a run's inputs except weights: digests of models, tokenizer, encoded data, sampler."""

import difflib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpo_dist.batching.sampler import (
    BatchSampler,
    Indices,
    batch_note,
    check_batch,
    make_sampler,
    short_run_warnings,
)
from dpo_dist.config.identity import RunIdentity
from dpo_dist.config.load import changed_keys
from dpo_dist.config.losses import LossKind, RouterConfig
from dpo_dist.config.metrics import AUC, MARGIN_PERCENTILES, PREFIX
from dpo_dist.config.run_folder import RunFolder
from dpo_dist.config.schema import (
    ModelConfig,
    ParallelismConfig,
    ParallelismKind,
    ReferenceMode,
    RunConfig,
    TeacherMode,
)
from dpo_dist.data import DataConfig, ImageProcessor, Part, SourceConfig, describe_counts
from dpo_dist.distributed.deepspeed_config import unsharded_loading
from dpo_dist.encoded.build import Preparation
from dpo_dist.encoded.dataset import (
    PreferenceDataset,
    check_fits_loss,
    check_ids_in_vocabulary,
    count_shared,
    count_shared_prompts,
    open_dataset,
)
from dpo_dist.encoded.partners import with_partners
from dpo_dist.encoded.views import with_views
from dpo_dist.foundation.errors import ConfigError
from dpo_dist.foundation.files import MEMO_FOLDER
from dpo_dist.model.architectures import (
    check_causal,
    check_positions,
    length_warnings,
    router_loss,
    router_notes,
)
from dpo_dist.model.attention.ulysses import check_shared_tokens
from dpo_dist.model.experts import check_shared_experts
from dpo_dist.model.files.folder import base_warnings, has_tokenizer, model_folder, start_folder
from dpo_dist.model.files.load import check_contents_at_hand, load_config, load_encoder, without_weights
from dpo_dist.model.files.manifest import check_undamaged
from dpo_dist.model.files.stops import padding_token, stop_notes
from dpo_dist.model.flops import StepFlops, step_flops
from dpo_dist.model.layers import check_device, text_notes
from dpo_dist.model.lora import experts_note
from dpo_dist.objective.metrics import MetricPlan
from dpo_dist.objective.router import RouterLoss
from dpo_dist.reference.digest import ModelFiles, description_on_every_node, digest_on_every_node
from dpo_dist.training.start.footprint import fit_micro_batches, stored_notes
from dpo_dist.training.start.open_run import Run
from dpo_dist.training.start.run_state import Identity

T = TypeVar("T")

_Encode = Callable[[str, Sequence[SourceConfig], Part], PreferenceDataset]

_NO_END = (
    "the tokenizer has no end token (eos_token): a response ends only with the chat template's end "
    "of a turn, and the trained model stops nowhere else; set eos_token in tokenizer_config.json"
)

NO_IMAGE = "name the column of images (images: COLUMN in fields), or set model.images=null to train on text"


@dataclass(frozen=True)
class EvaluationInputs:
    """Facts of a run's models without weights, and its evaluation data; the same on every rank."""

    policy_files: ModelFiles
    description: str  # digest of the files that results copy from the policy's folder
    reference_files: ModelFiles | None  # None if the loss uses no reference
    teacher_files: ModelFiles | None  # None if the loss has no teacher
    tokenizer: PreTrainedTokenizerBase
    processor: ImageProcessor | None  # None if images are not read
    flops: StepFlops
    weights: int  # number of the policy's weights
    router: RouterLoss | None  # losses that training adds for the policy's routers
    eval_set: PreferenceDataset | None

    @property
    def datasets_to_score(self) -> list[tuple[PreferenceDataset, Indices]]:
        """Each dataset with its indices that are scored; the training dataset is first."""
        if self.eval_set is None:
            return []
        return [(self.eval_set, np.arange(len(self.eval_set), dtype=np.int64))]

    def read_by(self, scorer: str) -> list[tuple[PreferenceDataset, Indices]]:
        """Return the datasets to score as a scorer reads them."""
        return [(dataset.view(scorer), indices) for dataset, indices in self.datasets_to_score]


@dataclass(frozen=True)
class Inputs(EvaluationInputs):
    """All inputs of a run; the sampler returns the indices of each training step."""

    train_set: PreferenceDataset
    sampler: BatchSampler

    @property
    def datasets(self) -> dict[str, PreferenceDataset]:
        """The datasets by name: `train`, and `eval` if the run has evaluation data."""
        datasets = {"train": self.train_set}
        if self.eval_set is not None:
            datasets["eval"] = self.eval_set
        return datasets

    @property
    def counts(self) -> dict[str, Any]:
        """The section `data` of summary.json: the counts of each dataset."""
        return {name: dataset.counts for name, dataset in self.datasets.items()}

    @property
    def datasets_to_score(self) -> list[tuple[PreferenceDataset, Indices]]:
        """Each dataset with its indices that are scored; the training dataset is first."""
        return [(self.train_set, self.sampler.visited_indices()), *super().datasets_to_score]


def identify(run: RunIdentity, inputs: Inputs) -> Identity:
    """Return the run's identity: the digests of all inputs that define its result, and its length."""
    return {
        **run.recorded,
        "data": inputs.train_set.fingerprint,
        "eval_data": inputs.eval_set.fingerprint if inputs.eval_set is not None else None,
        "model": inputs.policy_files.digest,
        "base": inputs.policy_files.base,
        "description": inputs.description,
        "reference": inputs.reference_files.digest if inputs.reference_files is not None else None,
        **({} if inputs.teacher_files is None else {"teacher": inputs.teacher_files.digest}),
    }


def load_inputs(run: Run, *, trains: bool = False) -> Inputs:
    """Return a run's inputs; rank 0 reads and encodes the data, all ranks map the files. Collective.

    With `trains`, checks options of training before any large file is read.
    """
    config = run.config
    models, encode = _load(run, config.loss.router, trains=trains)
    eval_set = models.eval_set
    part = Part.to_train(config.data, None if eval_set is None else eval_set.prompt_hashes[:])
    train_set = encode("train", config.data.train, part)
    if eval_set is not None:
        eval_set = _add_counts(
            run,
            eval_set,
            also_in_train=partial(count_shared, eval_set, train_set),
            prompts_also_in_train=partial(count_shared_prompts, eval_set, train_set),
        )
    train_set = _completed(run, train_set)
    if eval_set is not None:
        eval_set = _completed(run, eval_set)
    sampler = make_sampler(train_set.spans([source.weight for source in config.data.train]), config.trainer)
    inputs = Inputs(**vars(models) | {"eval_set": eval_set}, train_set=train_set, sampler=sampler)
    for name, dataset in inputs.datasets.items():
        for line in describe_counts(name, dataset.counts):
            run.say(line)
        labels = dataset.counts.get("labels")
        if labels:
            run.say(f"  {labels['good']:,} good and {labels['bad']:,} bad responses")
    _check_has_teacher(config, inputs)
    if LossKind.reverse_kl in config.loss.kinds:
        run.say("reverse_kl: for responses that this policy has just sampled (pairs.rounds), not for others")
    check_batch(sampler, config.loss.unit)
    note = batch_note(sampler, config.trainer, config.loss.unit)
    if note:
        run.say(note)
    for warning in short_run_warnings(sampler, config.loss.unit):
        run.warn(warning)
    return inputs


def _check_has_teacher(config: RunConfig, inputs: Inputs) -> None:
    """Check that a policy does not learn from what it says itself to the same prompts."""
    files = inputs.reference_files
    is_own = files is not None and files.digest == inputs.policy_files.digest
    own = {
        "reference": is_own and LossKind.reverse_kl in config.loss.kinds,
        "teacher": config.loss.needs_teacher and config.teacher.mode is TeacherMode.policy,
    }
    for scorer, is_policy in own.items():
        if is_policy and scorer not in inputs.train_set.views:
            raise ConfigError(
                f"the {scorer} is the policy itself, and reads the same prompts: nothing can be learned",
                where=f"{scorer}.path",
                got="null" if scorer == "teacher" else str(config.reference.path or config.model.path),
                remedy=f"set {scorer}.path=TEACHER, or another prompt: {scorer}.system=TEXT, or "
                f"{scorer}_prompt in the records (docs/reward_models.md)",
            )


def check_keep_best(metric: str, plan: MetricPlan) -> None:
    """Check that evaluations have the metric of `trainer.keep_best`."""
    loss = plan.loss
    labels = plan.labels
    more = MARGIN_PERCENTILES if loss.compares_pairs else ()
    if loss.is_unpaired:
        more = tuple(f"{AUC}/{label}" for label in labels)
    names = [PREFIX + name for name in (*plan.rows, *more)]
    if metric not in names:
        near = difflib.get_close_matches(metric, names, n=3) or names[:3]
        raise ConfigError(
            "the evaluations of this run do not have this metric",
            where="trainer.keep_best",
            got=metric,
            expected=f"a metric of docs/watching.md, such as {', '.join(near)}",
            remedy="set trainer.keep_best to such a metric; the metric of one source is "
            f"eval_rewards/{'auc' if loss.is_unpaired else 'accuracies'}/LABEL",
        )


def folder_of_own_tokenizer(config: RunConfig) -> Path | None:
    """Return the run's own model if it has a tokenizer; that of its base may have been replaced since.

    None if `model.path` is another one on purpose. Raises CheckpointError if the model was changed.
    """
    run = RunFolder(config.run.path)
    different_keys = changed_keys(run.config, config.identity)
    if not has_tokenizer(run.model) or {"model.path", "model.revision"} & different_keys.keys():
        return None
    check_undamaged(run.model, Path(config.reference.store) / MEMO_FOLDER, with_weights=False)
    return run.model


def load_evaluation_inputs(run: Run) -> EvaluationInputs:
    """Return the inputs of the verb `evaluate`; collective."""
    own_tokenizer = run.world.together(lambda: folder_of_own_tokenizer(run.config))
    inputs, _ = _load(run, encoder_folder=own_tokenizer)
    assert inputs.eval_set is not None, "evaluations have data"
    for line in describe_counts("eval", inputs.eval_set.counts):
        run.say(line)
    return replace(inputs, eval_set=_completed(run, inputs.eval_set))


def _completed(run: Run, dataset: PreferenceDataset) -> PreferenceDataset:
    """Return the dataset with counts of labels, the partners that the loss needs, and the scorers' views.

    Collective.
    """
    if run.config.loss.is_unpaired:

        def labels() -> dict[str, int]:
            good = int(dataset.labels_good(np.arange(len(dataset))).sum())
            return {"good": good, "bad": len(dataset) - good}

        dataset = _add_counts(run, dataset, labels=labels)
    if run.config.loss.needs_partners:
        partnered = partial(with_partners, dataset, run.config.data.max_length, run.config.data.longest)
        dataset = on_every_rank(run, partnered, "preparing the partners of records")
    if not dataset.scorer_prompts:
        return dataset
    for scorer in dataset.scorer_prompts.keys() - run.config.scorers:
        run.say(f"{scorer}_prompt of the data is not read: this run has no {scorer}")
    viewed = partial(with_views, dataset, run.config.scorers)
    dataset = on_every_rank(run, viewed, "preparing the prompts of reference and teacher")
    for scorer in dataset.views:
        others = int((dataset.scorer_prompts[scorer].tokens > 0).sum())
        run.say(f"the {scorer} reads another prompt in {others:,} of {len(dataset):,} examples")
    return dataset


def _load(
    run: Run, routers: RouterConfig | None = None, *, trains: bool = False, encoder_folder: Path | None = None
) -> tuple[EvaluationInputs, _Encode]:
    """Return models with evaluation data, and a function that encodes further data; collective.

    `routers`: options of losses for the policy's routers. `encoder_folder`: has the tokenizer,
    if not the policy's.
    """
    config = run.config
    world = run.world
    longest = config.data.longest
    folder = shared_model_folder(run, config.model.path, config.model.revision, "model.path")
    start = on_every_rank(run, partial(start_folder, config.model), "looking for the adapter")
    encoder = load_encoder(folder, encoder_folder or start, config.model)
    tokenizer = encoder.tokenizer
    processor = encoder.processor
    digest = encoder.digest
    with unsharded_loading(world):  # the shapes of sharded weights are empty
        model_config, causal_lm = checked_model(config.model, folder, start, longest, config.parallelism)
    flops = step_flops(causal_lm)
    weights = sum(map(torch.numel, causal_lm.parameters()))
    if trains:
        world.together(lambda: check_device(config.model, model_config.get_text_config(), world.device))
    router = router_loss(routers, causal_lm)
    policy = Policy(folder, start, tokenizer, model_config, causal_lm)
    for note in model_notes(policy, config.model, routers, config.data, trains=trains):
        (run.warn if note.is_warning else run.say)(note.text)
    if trains:
        with unsharded_loading(world):
            fit_micro_batches(run, causal_lm)
    # After all that needs no weights: the first start reads every byte of them.
    vocabulary = model_config.get_text_config().vocab_size
    description = description_on_every_node(config.model, folder, start, world)
    with run.console.heartbeat("reading the model's files to identify them"):
        files = _digest_models(run, folder, start)
        teacher_files = _digest_teacher(run)

    def encode(name: str, sources: Sequence[SourceConfig], part: Part) -> PreferenceDataset:
        def progress(source: str) -> AbstractContextManager[Callable[..., None]]:
            return run.console.progress(f"encoding the {name} data: {source}", "record")

        preparation = Preparation(
            sources, config.data, tokenizer, digest, progress, part, processor, config.systems
        )
        with run.console.heartbeat(f"preparing the {name} data"):
            encoded = world.on_main(preparation.whole)
        opened = partial(open_dataset, encoded, config.data, processor)
        dataset = on_every_rank(run, opened, f"verifying the {name} data")
        if processor is not None and dataset.images is None:
            run.warn(f"no usable record of the {name} data has an image: {NO_IMAGE}")
        world.on_main(lambda: check_ids_in_vocabulary(dataset, tokenizer, vocabulary))
        world.on_main(lambda: check_fits_loss(dataset, config.loss))
        return dataset

    sources = config.data.eval_sources
    eval_set = None
    if sources:
        eval_set = encode("eval", sources, Part.to_evaluate(config.data))
    policy_files, reference_files = files
    inputs = EvaluationInputs(
        policy_files,
        description,
        reference_files,
        teacher_files,
        tokenizer,
        processor,
        flops,
        weights,
        router,
        eval_set,
    )
    return inputs, encode


class Policy(NamedTuple):
    """The policy without its weights: its folder, that of the adapter to continue, and what they hold."""

    folder: Path
    start: Path | None
    tokenizer: PreTrainedTokenizerBase
    model_config: PreTrainedConfig
    causal_lm: PreTrainedModel


class Note(NamedTuple):
    """What a start and `--check` say, and what it is about."""

    about: str
    text: str
    is_warning: bool = False


def model_notes(
    policy: Policy, model: ModelConfig, routers: RouterConfig | None, data: DataConfig, *, trains: bool
) -> list[Note]:
    """Return what is said about a model before its weights are read; `trains`: also about its end tokens."""
    causal_lm = policy.causal_lm
    notes = [Note("model.path", text) for text in (*stored_notes(model, causal_lm), *text_notes(causal_lm))]
    experts = [*router_notes(routers, causal_lm), *experts_note(causal_lm, model.adapter)]
    notes += [Note("experts", text) for text in experts]
    long = length_warnings(policy.model_config, data.longest)
    notes += [Note("data.max_length", text, is_warning=True) for text in long]
    if not policy.tokenizer.eos_token and not model.gives_scores:
        notes.append(Note("end", _NO_END, is_warning=True))
    notes += [Note("adapter", text, is_warning=True) for text in base_warnings(model, policy.start)]
    ends: list[str] = []
    if trains and model.gives_scores:
        padding = padding_token(policy.tokenizer, data)
        if padding != policy.tokenizer.pad_token:
            ends.append(f"the written model pads rows with {padding}, which ends no text")
    elif trains:
        ends += stop_notes(policy.tokenizer, data, policy.folder)
    return [*notes, *(Note("end", text) for text in ends)]


def checked_model(
    model: ModelConfig, folder: Path, start: Path | None, longest: int, parallelism: ParallelismConfig
) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """Return the policy's configuration, and the model with its adapter on the meta device; check both.

    `longest`: tokens of the longest prompt with its response.
    """
    model_config = load_config(folder, model)
    check_causal(model_config)
    causal_lm = without_weights(model_config, model, start)
    check_shapes(causal_lm, longest, parallelism)
    check_contents_at_hand(folder, model)
    return model_config, causal_lm


def check_shapes(causal_lm: PreTrainedModel, longest: int, parallelism: ParallelismConfig) -> None:
    """Raise ConfigError if the policy's shapes do not fit the longest text, or the groups of processes."""
    check_shared_tokens(causal_lm.config, parallelism.sequence_parallel)
    check_shared_experts(causal_lm, parallelism.experts)
    check_positions(causal_lm, longest)


def _add_counts(run: Run, dataset: PreferenceDataset, **count: Callable[[], Any]) -> PreferenceDataset:
    """Return the dataset with further counts, computed by rank 0; collective."""
    counts = run.world.on_main(lambda: {name: number() for name, number in count.items()})
    return replace(dataset, counts=dataset.counts | counts)


def loads_whole(model: ModelConfig, parallelism: ParallelismConfig) -> bool:
    """Return whether every rank reads all weights; ZeRO-3 shards them while it loads them, on rank 0."""
    return model.quantization is not None or parallelism.kind is not ParallelismKind.zero3


def _digest_models(run: Run, policy_folder: Path, start: Path | None) -> tuple[ModelFiles, ModelFiles | None]:
    config = run.config
    reference = run.config.reference
    store = Path(reference.store)
    remote_code = config.model.trust_remote_code
    reads_whole = loads_whole(config.model, config.parallelism)
    if reference.mode is not ReferenceMode.none and reference.path is None:
        reads_whole = reads_whole or reference.quantization is not None
    policy_files = digest_on_every_node(policy_folder, store, remote_code, reads_whole, run.world, start)
    if reference.mode is ReferenceMode.none:
        return policy_files, None
    if reference.path is None:
        return policy_files, policy_files
    folder = shared_model_folder(run, reference.path, None, "reference.path")
    reads_whole = reference.quantization is not None
    return policy_files, digest_on_every_node(folder, store, remote_code, reads_whole, run.world)


def _digest_teacher(run: Run) -> ModelFiles | None:
    config = run.config
    if not config.loss.needs_teacher or config.teacher.path is None:
        return None
    folder = shared_model_folder(run, config.teacher.path, None, "teacher.path")
    store = Path(config.reference.store)
    return digest_on_every_node(folder, store, config.model.trust_remote_code, False, run.world)


def on_every_rank(run: Run, find: Callable[[], T], doing: str) -> T:
    """Return `find()` on every rank; rank 0 goes first, so that others with its disk find what it made."""

    def on_main() -> None:
        find()

    with run.console.heartbeat(doing):
        run.world.on_main(on_main)
        # Each rank verifies: a node may mount the files from another device, or have a cache of its own.
        return run.world.together(find)


def shared_model_folder(
    run: Run, path: str, revision: str | None, key: str, *, accepts_adapter: bool = False
) -> Path:
    """Return the folder of `model_folder` on every rank; collective."""
    find = partial(model_folder, path, revision, key, accepts_adapter=accepts_adapter)
    return on_every_rank(run, find, f"downloading {path}")
