"""Prepare a run's teacher: ask it once for its distributions and store them, or load it beside the policy."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_dist.batching.costs import ComputeCosts
from dpo_dist.batching.pack import PackedBatch
from dpo_dist.batching.sampler import Indices
from dpo_dist.batching.step_batch import shard_batch
from dpo_dist.config.metrics import AGREEMENT
from dpo_dist.config.schema import ReferenceConfig, TeacherMode
from dpo_dist.distributed.zero import Engine, PolicyEngine
from dpo_dist.encoded.dataset import PreferenceDataset
from dpo_dist.foundation.errors import ConfigError, ReferenceModelError
from dpo_dist.foundation.text import pluralize, size
from dpo_dist.model.files.load import check_same_vocabulary, load_config
from dpo_dist.objective.distillation import SparseRows, kept_distributions
from dpo_dist.reference.digest import model_label
from dpo_dist.reference.engine import load_for_scoring, scoring_config
from dpo_dist.reference.fill import StoreFiller
from dpo_dist.reference.store import LogpStore, ReferenceFingerprint, StoredLogps
from dpo_dist.reference.teacher import Teacher, with_uniforms
from dpo_dist.training.reference import ScoredOnce, StoredSample, choose_sample, compare, scoring_profile
from dpo_dist.training.start.inputs import EvaluationInputs
from dpo_dist.training.start.open_run import Run

_KEY = "teacher.path"
_TEACHER = "teacher"
_ROWS_PER_SHARD = 256  # a row takes a hundred times the bytes of a log-prob


@dataclass(frozen=True)
class PreparedTeacher:
    """A run's teacher, None for a loss without one, and the report about it."""

    teacher: Teacher | None = None
    report: dict[str, Any] = field(default_factory=dict)  # `reference.teacher` of summary.json

    def beside(self, policy: PolicyEngine) -> Teacher | None:
        """Return the teacher in a run that trains this policy, which may be its own teacher."""
        if self.teacher is None or self.teacher.store is not None or self.teacher.engine is not None:
            return self.teacher
        return replace(self.teacher, policy=policy)

    @property
    def engine(self) -> Engine | None:
        """The model beside the policy."""
        return None if self.teacher is None else self.teacher.engine


def prepare_teacher(run: Run, inputs: EvaluationInputs) -> PreparedTeacher:
    """Return the teacher of a loss that has one; in mode `cached`, fill the store. Collective.

    Where the policy is its own teacher, it is still to be set.
    """
    config = run.config
    world = run.world
    mode = config.teacher.mode
    if config.loss.needs_teacher and config.teacher.is_policy:
        vocabulary = load_config(inputs.policy_files.folder, config.model).get_text_config().vocab_size
        kept = kept_distributions(config.teacher, config.loss, vocabulary)
        without_adapter = mode is TeacherMode.adapter
        own = Teacher(kept, without_adapter=without_adapter)
        return PreparedTeacher(own, {"mode": mode.value})
    files = inputs.teacher_files
    if files is None:
        return PreparedTeacher()
    assert config.teacher.path is not None
    folder = files.folder
    world.on_main(
        lambda: check_same_vocabulary(folder, inputs.tokenizer, config.model, inputs.processor, _KEY)
    )
    # Output layers may be padded to different numbers of ids, such as those of Qwen2.5. Over the tokenizer's,
    # which a text can have, the answers are the same for all students.
    folders = (inputs.policy_files.folder, folder)
    sizes = [load_config(each, config.model).get_text_config().vocab_size for each in folders]
    kept = kept_distributions(
        config.teacher, config.loss, min(*sizes, max(inputs.tokenizer.get_vocab().values()) + 1)
    )
    load = partial(
        load_for_scoring,
        folder,
        scoring_config(config.model, None),
        ReferenceConfig(offload=config.teacher.offload),
        config.data.longest,
        world,
        key=_KEY,
        processor=inputs.processor,
    )
    report: dict[str, Any] = {"mode": config.teacher.mode.value}
    if config.teacher.mode is TeacherMode.live:
        return PreparedTeacher(Teacher(kept, engine=load()), report)
    # The entries of the store that these files give under these numerics and draws (law L3).
    assert isinstance(kept, SparseRows)
    rows = (
        f"{kept.k} largest, {kept.drawn} drawn with seed 0, of {kept.vocabulary} ids, "
        f"temperature {kept.temperature}"
    )
    profile = scoring_profile(run, folder, None) | {"rows": rows}
    label = model_label(config.teacher.path, folder)
    fingerprint = ReferenceFingerprint(files.digest, profile, label, kept.width)
    empty = LogpStore(Path(config.reference.store), fingerprint, [])
    scored = inputs.read_by(_TEACHER)
    asked = ScoredOnce(run, inputs, load, ("as_teacher",))
    prepare = partial(with_uniforms, kept=kept)
    filler = asked.filler(
        empty, entries_per_shard=_ROWS_PER_SHARD, which=0, prepare=prepare, fault=kept.fault_of_others
    )
    responses, tokens = world.on_main(lambda: _missing(filler, scored))
    if responses:
        taken = 4 * kept.width * tokens
        run.say(f"teacher: distributions of {pluralize(responses, 'response')} take {size(taken)} of disk")
        world.on_main(lambda: _check_room(empty.folder, taken))
    if config.teacher.digest is not None:
        asked.load = partial(_load_nothing, run, filler, scored)
    filled = asked.fill(filler, scored, _TEACHER, "response")
    report |= {**filled.as_dict(), "entries": str(empty.folder)}
    store = filler.open_filled()
    teacher = Teacher(kept, store=store)
    sample = choose_sample(run, store, scored, _TEACHER)
    if config.teacher.digest is not None:
        keys = sample.dataset.keys_of(sample.indices.tolist(), which=0)
        entropy = world.on_main(lambda: float(np.concatenate(store.read(keys))[:, -1].mean()))
        report |= {
            "digest": files.digest,
            "not_compared": [*sample.urls, *sample.unsampled],
            "mean_entropy": entropy,
        }
        run.warn(
            f"teacher: nothing here can compare these answers with the model {files.digest}; their mean "
            f"entropy is {entropy:.3g} nats a token, and evaluations have {AGREEMENT}"
        )
        return PreparedTeacher(teacher, report)
    if sample.urls:
        filler.load_scorer()
    if asked.engine is not None:
        report["largest_difference"] = _check_answers(run, asked.engine, teacher, sample, filler.costs)
        run.say(
            "teacher check passed: stored and newly computed distributions of a sample differ by at most "
            f"{report['largest_difference']:.2g}"
        )
    else:
        run.say("teacher: all its distributions are stored; it is not loaded to compare a sample with them")
    return PreparedTeacher(teacher, report | asked.free())


@torch.no_grad()
def _check_answers(
    run: Run, engine: Engine, teacher: Teacher, sample: StoredSample, costs: ComputeCosts
) -> float:
    """Ask the teacher again for a sample; return the largest difference of a token. Collective.

    Raises what `compare` raises.
    """
    world = run.world
    place = (world.replica, world.replicas)
    share = shard_batch(sample.dataset, sample.indices, *place, run.micro_batch_tokens, costs, which=0)
    kept = teacher.kept
    assert isinstance(kept, SparseRows)

    def difference(batch: PackedBatch) -> StoredLogps:
        asked = with_uniforms(batch, kept).to(world.device)
        fresh = engine.token_logps(asked, ("as_teacher",)).T.cpu().numpy()
        inputs = teacher.ready(batch).teacher
        assert inputs is not None
        assert inputs.rows is not None
        return kept.distances(inputs.rows.numpy(), fresh)

    differences = compare(run, sample, share, share.batches(), difference, "distributions of the teacher")
    return max(float(of_tokens.max()) for of_tokens in differences)


def _load_nothing(
    run: Run, filler: StoreFiller, scored: Sequence[tuple[PreferenceDataset, Indices]]
) -> Engine:
    """Raise the error of answers that are missing, of a teacher that is not here. Collective."""
    missing, _ = run.world.on_main(lambda: _missing(filler, scored))
    raise ReferenceModelError(
        "answers of a teacher that is not here are missing",
        where="teacher.digest",
        got=f"{pluralize(missing, 'response')} without an answer by {run.config.teacher.digest}",
        remedy="name a store that has them in reference.behind, and use its data, template and lengths; "
        "answers by another device or version need reference.accept=rounding",
    )


def _missing(filler: StoreFiller, scored: Sequence[tuple[PreferenceDataset, Indices]]) -> tuple[int, int]:
    """Return how many responses the store lacks, and their tokens."""
    responses = 0
    tokens = 0
    for dataset, indices in scored:
        missing, *_ = filler.survey(dataset, indices)
        examples = dataset.locate_responses(missing)[0]
        responses += len(missing)
        tokens += int(dataset.piece_tokens[dataset.first_pieces[examples] + 1].sum(dtype="int64"))
    return responses, tokens


def _check_room(folder: Path, taken: int) -> None:
    """Check that the disk has room for `taken` bytes of entries."""
    disk = shutil.disk_usage(folder)
    if disk.total and taken > disk.free:
        raise ConfigError(
            "the disk has no room for the teacher's distributions",
            where="reference.store",
            got=f"{size(disk.free)} free on the file system of {folder}",
            expected=size(taken),
            remedy="set reference.store to another disk, lower teacher.k, or set teacher.mode=live",
        )
