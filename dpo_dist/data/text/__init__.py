"""Render a record as text by a chat template, and know where each part of the text begins."""
