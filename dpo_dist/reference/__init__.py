"""Log-probs of the reference model: computed once, stored by content, looked up by training (law L3)."""
