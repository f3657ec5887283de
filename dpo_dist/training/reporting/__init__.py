"""Reports of a run: metrics rows, trackers, and interfaces of the reports that a verb passes in."""
