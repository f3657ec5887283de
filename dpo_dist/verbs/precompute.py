"""Fill the store by reference and teacher: `accelerate launch -m dpo_dist precompute +experiment=qwen7b`.

Takes the configuration of the training run, or reads it from `run.dir`. Computes only what is missing.
"""

from dpo_dist.foundation.signals import StopRequest, end_at_signals

if __name__ == "__main__":
    end_at_signals()  # the imports take seconds, on a network file system more

from dpo_dist.config.command_line import run_verb
from dpo_dist.config.rules import check_rules, needs_of
from dpo_dist.config.schema import ReferenceMode, RunConfig, TeacherMode
from dpo_dist.foundation.errors import ExitCode
from dpo_dist.foundation.types import CheckReport
from dpo_dist.training.start.preflight import check_start, checked_console


def main(config: RunConfig) -> int:
    """Store what a run with this configuration needs of other models; return the exit code."""
    check_rules(config, needs_of("precompute"))
    stop = StopRequest(max_seconds=config.trainer.max_seconds)
    with stop.listening(), checked_console(config) as console:
        # These imports are slow.
        from dpo_dist.training.reference import prepare_reference  # noqa: PLC0415
        from dpo_dist.training.start.inputs import load_inputs  # noqa: PLC0415
        from dpo_dist.training.start.open_run import open_run, say_header  # noqa: PLC0415
        from dpo_dist.training.teacher import prepare_teacher  # noqa: PLC0415

        with open_run(config, console, stop) as run:
            say_header(run)
            inputs = load_inputs(run)
            stored = []
            with stop.deferred():
                if config.reference.mode is ReferenceMode.cached:
                    prepare_reference(run, inputs)
                    stored.append("reference: all log-probs")
                if inputs.teacher_files is not None and config.teacher.mode is TeacherMode.cached:
                    prepare_teacher(run, inputs)
                    stored.append("teacher: all distributions")
            for what in stored:
                run.say(f"{what} of this run are in the store {config.reference.store}")
        return ExitCode.completed


def check(config: RunConfig) -> CheckReport:
    """Check everything that `main` needs before it uses a GPU."""
    check_start(config)
    from dpo_dist.training.start.dry_run import dry_run  # noqa: PLC0415  (slow)

    return dry_run(config, trains=False)


if __name__ == "__main__":
    run_verb(main, check, verb="precompute")
