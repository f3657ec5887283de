"""The frozen model's log-probs: addressed by content, stored once, served to training (law L3)."""
