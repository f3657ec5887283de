"""The table of verbs: what each does, and which configuration it takes.

A new verb is a row here, the module that runs it, and its name at the keys that it reads.
"""

from typing import NamedTuple


class Verb(NamedTuple):
    """A program of the package, `dpo-dist NAME`; the schema says which keys it reads."""

    module: str
    """The module that `python -m` runs."""
    help: str
    needs: tuple[str, ...] = ()
    """The keys that must be set."""
    is_configured: bool = True
    """Whether the verb takes KEY=VALUE words."""
    reads_data: bool = True
    takes_training: bool = True
    """Whether the verb takes the command line of a training run; `pairs` with rounds does, too."""
    reuses_config: bool = False
    """Whether the verb reads config.yaml in `run.dir` for a command that only names this run."""
    is_one_process: bool = False
    """Whether rank 0 alone works if a launcher starts several processes."""
    takes_words: tuple[str, ...] = ("model.path", "data.train")
    """The keys to suggest for a word without a key."""


_RUN = ("model.path", "data.train")
VERBS = {
    "train": Verb("dpo_dist.train", "train a policy, from its last checkpoint if there is one", _RUN),
    "sweep": Verb(
        "dpo_dist.tools.sweep",
        "train a run for each point of a grid of values",
        _RUN,
        is_one_process=True,
    ),
    "precompute": Verb(
        "dpo_dist.verbs.precompute",
        "score the pairs of a run by the reference model, and store the log-probs",
        (*_RUN, "reference.mode"),
        reuses_config=True,
    ),
    "evaluate": Verb(
        "dpo_dist.verbs.evaluate",
        "score pairs with trained models and the reference",
        ("model.path",),
        reuses_config=True,
        takes_words=("run.dir",),
    ),
    "compare": Verb(
        "dpo_dist.tools.compare",
        "ask several models the same prompts, side by side",
        takes_training=False,
        takes_words=("compare.models",),
    ),
    "doctor": Verb(
        "dpo_dist.tools.doctor",
        "examine the data of a run, and encode them",
        ("data.train",),
        reuses_config=True,
        is_one_process=True,
    ),
    "encode": Verb(
        "dpo_dist.verbs.encode",
        "encode the data of a run on CPUs, alone or by an array of jobs",
        _RUN,
        reuses_config=True,
        is_one_process=True,
    ),
    "plan": Verb(
        "dpo_dist.tools.plan",
        "compute memory and hours of a run on GPUs that one does not have yet",
        ("model.path",),
        is_one_process=True,
        takes_words=("model.path",),
    ),
    "pairs": Verb(
        "dpo_dist.tools.pairs",
        "make preference records, by scores, models and judges, or people",
        ("data.train",),
        takes_training=False,
    ),
    "export": Verb(
        "dpo_dist.verbs.export",
        "write a checkpoint as a model folder; merge an adapter; average models",
        ("model.path",),
        reads_data=False,
        reuses_config=True,
        is_one_process=True,
        takes_words=("run.dir",),
    ),
    "convert": Verb(
        "dpo_dist.tools.convert",
        "translate a run of TRL, LLaMA-Factory, axolotl, ms-swift or open-instruct",
        is_configured=False,
        is_one_process=True,
        reads_data=False,
    ),
    "report": Verb(
        "dpo_dist.tools.report",
        "write the page of a run again, or compare several runs",
        is_configured=False,
        is_one_process=True,
    ),
    "chat": Verb(
        "dpo_dist.tools.chat",
        "talk to a model in the terminal, also beside its base",
        is_configured=False,
        is_one_process=True,
    ),
    "selftest": Verb(
        "dpo_dist.tools.selftest",
        "test this machine: kernels, ways of training, speeds",
        is_configured=False,
        is_one_process=True,  # it starts the others itself
    ),
    "store": Verb(
        "dpo_dist.verbs.store",
        "list, verify and clean a store of reference log-probs",
        is_configured=False,
        is_one_process=True,
    ),
    "agent-docs": Verb(
        "dpo_dist.verbs.agent_docs",
        "print the page for coding agents: commands, exit codes, JSON",
        is_configured=False,
        is_one_process=True,
    ),
    "launch": Verb(
        "dpo_dist.verbs.launch",
        "start a verb on several processes, with the arguments of accelerate launch",
        is_configured=False,
        is_one_process=True,
    ),
}
EVERY_VERB = " ".join(name for name, verb in VERBS.items() if verb.is_configured)
"""The verbs with a configuration, as `verbs` of a key."""
VERBS_WITH_DATA = " ".join(name for name in EVERY_VERB.split() if VERBS[name].reads_data)
