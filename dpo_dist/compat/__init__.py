"""Other trainers: what they call our keys, and the translation of their files."""
