"""Errors, texts, files, processes and streams: used by every room."""
