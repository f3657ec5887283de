"""Test this machine."""
