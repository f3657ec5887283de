"""Runs of other trainers as runs of this one: their files and commands read, their keys translated."""
