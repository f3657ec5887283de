"""The reference model's log-probs: computed once, stored by token ids, read by training (law L3)."""
