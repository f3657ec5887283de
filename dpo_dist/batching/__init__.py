"""The batch of a step: sampled, planned over ranks and micro-batches, packed without padding."""
