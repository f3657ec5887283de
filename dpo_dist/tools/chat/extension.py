"""The verb `chat`."""

from dpo_dist.kit import Extension, Verb

EXTENSION = Extension(
    verbs={
        "chat": Verb(
            "dpo_dist.tools.chat",
            "talk to a model in the terminal",
            is_configured=False,
            is_one_process=True,
        ),
    },
)
