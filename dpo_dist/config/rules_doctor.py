"""The rows of `rules` about the doctor."""

from dpo_dist.config.check import Rule


def _is_numbers_by_name(thresholds: object) -> bool:
    if not isinstance(thresholds, dict):
        return thresholds is None
    return all(
        isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
        for value in thresholds.values()
    )


DOCTOR_RULES = (
    Rule(
        "doctor.thresholds",
        lambda c: not _is_numbers_by_name(c.doctor.thresholds),
        "doctor.thresholds is no mapping of rules to numbers",
        "write 'doctor.thresholds={{duplicates: 0.05}}'; docs/doctor.md lists the rules",
        "null or {{RULE: NUMBER, ...}}, numbers of 0 or more",
    ),
)
