"""Facts about records and sources, each with the findings that follow from it."""
