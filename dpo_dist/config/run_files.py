"""Forms of the JSON files of a run directory: what their readers use of them.

A run directory may be a stranger's, or damaged: each file is checked before its facts are used. Every field
may be absent unless a run always writes it, and files may have more fields.
"""

from typing import Annotated, Any

from pydantic import BaseModel, Field, InstanceOf

Text = InstanceOf[str]
"""Of any characters: pydantic's own texts have no lone surrogate."""
Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class RunRecord(BaseModel, extra="allow"):
    """run_state.json, for pages."""

    identity: dict[str, Text | None] | None = None


class Environment(BaseModel, extra="allow"):
    """environment.json."""

    packages: dict[str, Text]
    gpus: list[Text] | None = None
    command: Text | None = None
    world_size: Count | None = None


class LossTerm(BaseModel, extra="allow"):
    """A term of a loss."""

    kind: Text


class SavedLoss(BaseModel, extra="allow"):
    """The section `loss`."""

    kind: Text | None = None
    terms: list[LossTerm] | None = None


class SavedOptimizer(BaseModel, extra="allow"):
    """The section `optim`."""

    lr: Number | None = None


class SavedTrainer(BaseModel, extra="allow"):
    """The section `trainer`."""

    global_batch_pairs: Count | None = None


class SavedConfig(BaseModel, extra="allow"):
    """config.yaml, for pages; runs of other versions have other keys."""

    model: dict[str, Any] | None = None
    loss: SavedLoss | None = None
    optim: SavedOptimizer | None = None
    trainer: SavedTrainer | None = None


class Labels(BaseModel):
    """Numbers of labelled responses."""

    good: Count
    bad: Count


class SourceCounts(BaseModel, extra="allow"):
    """Records of a source."""

    label: Text
    path: Text
    read: Count
    kept: Count
    pairs: Count
    dropped: dict[str, Count]


class DatasetCounts(BaseModel, extra="allow"):
    """Records of the training or evaluation data, with further counts by their names."""

    read: Count
    kept: Count
    pairs: Count = 0
    dropped: dict[str, Count] | None = None
    labels: Labels | None = None
    examples: list[Text] = []
    sources: list[SourceCounts]
    response_truncated: Count = 0
    chat_template_not_applied: Count = 0
    prompts_also_in_train: Count = 0


class Drift(BaseModel, extra="allow"):
    """How far rounding alone moves log-probs."""

    rms_response_drift: Number
    mean_token_drift: Number


class ReferenceReport(BaseModel, extra="allow"):
    """How the reference's log-probs came."""

    mode: Text | None = None
    computed: Count = 0
    hits: Count = 0
    drift: Drift | None = None


class SavedCounts(BaseModel, extra="forbid"):
    """Records of a run."""

    train: DatasetCounts
    eval: DatasetCounts | None = None


class SavedMeans(BaseModel, extra="forbid"):
    """The running means of a loss."""

    margin: Number | None = None
    reward: Number = 0.0
    pairs: Count = 0


class CheckpointState(BaseModel, extra="allow"):
    """state.json of a checkpoint, for those who do not resume the run."""

    model: Text
    step: Count
    steps: Count
    pairs_seen: Count
    counts: SavedCounts
    reference_report: ReferenceReport
    running: SavedMeans


class Band(BaseModel):
    """A band in which a metric should be."""

    metric: Text
    step: Count | None
    low: Number
    high: Number


class Settings(BaseModel, extra="allow"):
    """Settings by their keys."""

    terms: list[dict[str, Any]] | None = Field(None, alias="loss.terms")
    beta: Number | None = Field(None, alias="loss.beta")
    desirable: Number | None = Field(None, alias="loss.desirable_weight")
    undesirable: Number | None = Field(None, alias="loss.undesirable_weight")
    lr: Number | None = Field(None, alias="optim.lr")


class WorkTimes(BaseModel, extra="allow"):
    """Time by kind of work."""

    seconds: dict[str, Number] = {}
    device_seconds: Number | None = None


class BestValue(BaseModel):
    """The best value of a metric."""

    step: Number
    value: Number


class BestSaved(BestValue):
    """The best checkpoint."""

    metric: Text


class JudgedFinding(BaseModel):
    """A finding of the verdict."""

    rule: Text
    text: Text


class Judged(BaseModel):
    """The verdict."""

    sentence: Text
    findings: list[JudgedFinding]


class Summary(BaseModel, extra="allow"):
    """summary.json."""

    exit: Text | None = None
    steps: Count | None = None
    model_step: Count = 0
    pairs_seen: Count | None = None
    bad_steps: Count = 0
    bad_in_a_row: Count = 0
    vocabulary: Count | None = None
    world_size: Count | None = None
    train_seconds: Number | None = None
    pairs_per_second: Number | None = None
    peak_memory_bytes: Number | None = None
    settings: Settings | None = None
    bands: list[Band] | None = None
    data: dict[str, DatasetCounts] | None = None
    reference: ReferenceReport | None = None
    work: WorkTimes | None = None
    final: dict[str, Number | None] | None = None
    best: dict[str, BestValue] | None = None
    best_checkpoint: BestSaved | None = None
    verdict: Judged | None = None


class DoctorFinding(BaseModel, extra="allow"):
    """A finding of the doctor."""

    rule: Text
    level: Text
    text: Text
    source: Text | None
    share: Number | None = None
    remedy: Text
    examples: list[Text]


class DoctorReport(BaseModel, extra="allow"):
    """doctor.json."""

    findings: list[DoctorFinding]


class EvaluationResults(BaseModel, extra="allow"):
    """The results of all pairs or of a source: metrics by their names."""

    eval_pairs: Count
    intervals: dict[str, Annotated[list[Number], Field(min_length=2, max_length=2)]]
    __pydantic_extra__: dict[str, Number | None]


EvaluationFile = dict[str, EvaluationResults]
"""evaluation.json."""


class SampleRow(BaseModel, extra="allow"):
    """A line of a file of samples."""

    prompt: Text
    prompt_id: Text
    source: Text
    step: Count
    policy: Text
    policy_tokens: Count | None
    policy_finished: bool | None
    reference: Text | None
    reference_tokens: Count | None
    reference_finished: bool | None
    chosen: Text
    label: Text | None = None
    images: list[Text | None] = []


class WorstRow(BaseModel, extra="allow"):
    """A line of the worst pairs of an evaluation; of labelled data it has one response."""

    prompt: Text
    origin: Text
    margin: Number
    chosen: Text = ""
    rejected: Text = ""
    images: list[Text | None] = []


class AnswerText(BaseModel, extra="allow"):
    """A response of a comparison."""

    text: Text


class AnswerRow(BaseModel, extra="allow"):
    """A line of the responses of a comparison."""

    prompt: Text
    responses: dict[str, AnswerText]
