"""Render a record as text by a chat template, and find where each part of the text begins."""
