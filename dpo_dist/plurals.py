"""Numbers with their noun, for people."""


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return "1 pair", "0 pairs", "2,000 pairs".

    Args:
        number: 0 or more.
        noun: in the singular.
        plural: of a noun that takes more than an s: "entries".
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
