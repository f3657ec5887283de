"""Translate the configuration of another trainer."""
