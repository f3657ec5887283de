"""The verb `convert`, and what is known of other trainers."""

from dpo_dist.kit import Extension, Verb

EXTENSION = Extension(
    verbs={
        "convert": Verb(
            "dpo_dist.compat.convert",
            "translate a file of keys of TRL, LLaMA-Factory, axolotl or others",
            is_configured=False,
            is_one_process=True,
            reads_data=False,
        ),
    },
    hooks={
        "advice": "dpo_dist.compat.other_trainers:advice_on",
        "equivalents": "dpo_dist.compat.other_trainers:equivalents",
        "foreign_file": "dpo_dist.compat.other_trainers:foreign_file",
    },
)
