"""The verb `report`."""

from dpo_dist.kit import Extension, Verb

EXTENSION = Extension(
    verbs={
        "report": Verb(
            "dpo_dist.tools.report",
            "write the page of a run again, or compare several runs",
            is_configured=False,
            is_one_process=True,
        ),
    },
    hooks={
        "reporting": "dpo_dist.tools.report.recorder:reporting",
        "run_card": "dpo_dist.tools.report.card:run_card",
    },
)
