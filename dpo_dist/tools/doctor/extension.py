"""The verb `doctor`, and its keys."""

from enum import StrEnum

from dpo_dist.foundation.fields import key, schema, section
from dpo_dist.kit import Extension, Verb

FailOn = StrEnum("FailOn", ["warning", "error", "never"])


@schema
class DoctorConfig:
    """How `dpo-dist doctor` examines the data."""

    fail_on: FailOn = key(FailOn.warning)
    """Lowest level of a finding that makes the exit code 1."""


EXTENSION = Extension(
    verbs={
        "doctor": Verb(
            "dpo_dist.tools.doctor",
            "examine the data of a run, and encode them",
            ("data.train",),
            reuses_config=True,
            is_one_process=True,
            reads=("data", "loss.kind", "loss.terms"),
        ),
    },
    sections={"doctor": section(DoctorConfig, free=True, verbs="doctor")},
)
