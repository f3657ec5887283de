"""Properties are tried on the same examples everywhere, and no example is judged by the time it takes."""

from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("repeatable")
