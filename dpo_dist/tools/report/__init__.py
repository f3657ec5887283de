"""What is written about a run: rows, samples, closing table, page, model card."""
