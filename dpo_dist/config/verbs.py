"""The table of verbs: what each does, and which configuration it takes.

A new verb is a row here, the module that runs it, and its name at the keys that it reads; a tool's is a row
of its `Extension`, with the trainer's keys that it reads.
"""

from dpo_dist.config.extensions import Verb, extensions

_RUN = ("model.path", "data.train")
OWN = {
    "train": Verb("dpo_dist.train", "train a policy, from its last checkpoint if there is one", _RUN),
    "precompute": Verb(
        "dpo_dist.verbs.precompute",
        "score the pairs of a run by the reference model, and store the log-probs",
        (*_RUN, "reference.mode"),
        reuses_config=True,
    ),
    "export": Verb(
        "dpo_dist.verbs.export",
        "write a checkpoint as a model folder; merge an adapter",
        ("model.path",),
        reads_data=False,
        reuses_config=True,
        is_one_process=True,
        takes_word="run.dir",
    ),
    "evaluate": Verb(
        "dpo_dist.verbs.evaluate",
        "score pairs with trained models and the reference",
        ("model.path",),
        reuses_config=True,
        takes_word="run.dir",
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
"""The verbs of the trainer."""
VERBS = dict(OWN)
for _extension in extensions():
    VERBS |= _extension.verbs
EVERY_VERB = " ".join(name for name, verb in VERBS.items() if verb.is_configured)
"""The verbs with a configuration, as `verbs` of a key."""
