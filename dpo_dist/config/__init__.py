"""What a run is: the typed schema, how it is composed, and what must fit together."""
