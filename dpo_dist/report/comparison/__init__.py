"""`comparison.html` from the results of a comparison."""
