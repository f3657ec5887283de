"""From files to pairs to token ids to the micro-batches of a step."""
