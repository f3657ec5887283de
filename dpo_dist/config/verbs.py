"""The table of verbs: what each does, and what it takes of a configuration.

A new verb is a row here, the module that runs it, and its name at the keys that it reads.
"""

from typing import NamedTuple


class Verb(NamedTuple):
    """A program of the package, `dpo-dist NAME`; the schema says which keys it reads."""

    module: str
    """`python -m` runs it."""
    help: str
    needs: tuple[str, ...] = ()
    """The keys without which it does nothing."""
    is_configured: bool = True
    """It takes a configuration, by `run_verb`."""
    reads_data: bool = True
    takes_training: bool = True
    """It takes the whole command line of a training run; `pairs` with rounds does, too."""
    of_former_run: bool = False
    """It may take the configuration of the run in `run.dir`, unless a command has the first of `needs`."""
    is_one_process: bool = False
    """If a launcher starts several processes, rank 0 alone works."""
    takes_words: tuple[str, ...] = ("model.path", "data.train")
    """The keys that a word without a key may be meant for."""
    takes_points: bool = False
    """Its keys may have several values each, and it gets all combinations."""


_RUN = ("model.path", "data.train")
VERBS = {
    "train": Verb("dpo_dist.train", "train a policy, from its last checkpoint if there is one", _RUN),
    "sweep": Verb(
        "dpo_dist.tools.sweep",
        "train a run for each point of a grid of values",
        _RUN,
        is_one_process=True,
        takes_points=True,
    ),
    "precompute": Verb(
        "dpo_dist.verbs.precompute",
        "score the pairs of a run by the reference model, and store the log-probs",
        (*_RUN, "reference.mode"),
        of_former_run=True,
    ),
    "evaluate": Verb(
        "dpo_dist.verbs.evaluate",
        "score pairs with trained models and the reference",
        ("model.path",),
        of_former_run=True,
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
        of_former_run=True,
        is_one_process=True,
    ),
    "plan": Verb(
        "dpo_dist.tools.plan",
        "compute memory and hours of a run on GPUs that one does not have yet",
        ("model.path",),
        is_one_process=True,
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
        of_former_run=True,
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
    "launch": Verb(
        "dpo_dist.verbs.launch",
        "start a verb on several processes, with the arguments of accelerate launch",
        is_configured=False,
        is_one_process=True,
    ),
}
EVERY_VERB = " ".join(name for name, verb in VERBS.items() if verb.is_configured)
"""The verbs with a configuration, for `verbs` of a key."""
VERBS_WITH_DATA = " ".join(name for name in EVERY_VERB.split() if VERBS[name].reads_data)
