"""`report.html`: the page about a run."""
