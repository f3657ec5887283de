"""The verb `selftest`."""

from dpo_dist.kit import Extension, Verb

EXTENSION = Extension(
    verbs={
        "selftest": Verb(
            "dpo_dist.tools.selftest",
            "test this machine: kernels, ways of training, speeds",
            is_configured=False,
            is_one_process=True,  # it starts the others itself
        ),
    },
)
