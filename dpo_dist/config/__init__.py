"""Configuration of a run: the typed schema, its rules, composition, and help for mistyped input."""
