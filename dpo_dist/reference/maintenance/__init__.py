"""Maintenance of a store: statistics, verification and repair, garbage collection. Imports no torch."""
