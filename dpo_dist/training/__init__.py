"""The loop: what one step is, how steps follow each other, and where everything is put together."""
