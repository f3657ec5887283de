"""Numbers with their noun, for people."""


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return "1 pair", "0 pairs", "2,000 pairs".

    Args:
        number: 0 or more.
        noun: in the singular.
        plural: of a noun that takes more than an s: "entries".
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """Return "42 s", "5 min 03 s", "3 h 05 min" or "2 d 04 h"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"
