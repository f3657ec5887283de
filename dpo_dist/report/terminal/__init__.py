"""The terminal: messages, progress, tables."""
