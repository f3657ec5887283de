"""Console, metrics, verdict, pages, doctor, comparisons: what people see of a run and of their data."""
