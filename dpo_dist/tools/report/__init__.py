"""Report on a run: metrics rows, samples, the closing table, the page, the verdict, the model card."""
