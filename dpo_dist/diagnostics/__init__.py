"""The doctor's checks of preference data; no terminal, no HTML, no Hydra."""
