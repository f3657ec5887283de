"""What a run reports: metrics rows, trackers, and the interfaces of what a verb passes in."""
