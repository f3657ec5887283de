"""The files of a comparison."""

from dpo_dist.kit import PathBelow, RunFolder


class ComparisonFolder(RunFolder):
    """The run directory of a comparison."""

    comparison = PathBelow("comparison")
    comparison_answers = PathBelow("comparison/answers.jsonl")
    comparison_results = PathBelow("comparison/comparison.json")
    comparison_page = PathBelow("comparison/comparison.html")
    comparison_parts = PathBelow("comparison/parts")
    """Finished parts of the work, by the digest of the settings that define them."""
    comparison_models = PathBelow("comparison/models")
    """Model folders written from checkpoints."""
