"""Compare two models: `dpo-dist compare 'compare.models=[base=./base,output/a]' data.eval=[FILE]`.

Asks both the same held-out prompts, and writes a page with their answers side by side and, with a judge
(`pairs.reward_model`, `pairs.function` or `pairs.endpoint`), scores and the win rate of the second one.
`accelerate launch -m dpo_dist compare ...` shares the work among processes. The same command again continues
after the finished parts. docs/evaluate.md explains the files.
"""

from dpo_dist.foundation.console import open_console
from dpo_dist.foundation.errors import ExitCode
from dpo_dist.kit import RunConfig, run_verb
from dpo_dist.tools.compare.folder import ComparisonFolder
from dpo_dist.tools.compare.start import check_comparison


def main(config: RunConfig) -> int:
    """Write the comparison of both models; return the exit code."""
    models = check_comparison(config)
    folder = ComparisonFolder(config.run.path)
    with open_console(folder.rank_log, config.console.style) as console:
        from dpo_dist.tools.compare.models import compare_models  # noqa: PLC0415  (slow, prints)
        from dpo_dist.tools.compare.page import comparison_table, write_comparison_page  # noqa: PLC0415

        results = compare_models(config, models, console)
        if results is not None:
            console.result("comparison", results, comparison_table(results))
            write_comparison_page(folder, results)
            console.say(f"page: {folder.comparison_page}   responses: {folder.comparison_answers}")
    return ExitCode.completed


if __name__ == "__main__":
    run_verb(main, verb="compare")
