"""What several tools use: responses of models and judges, pages, tables, findings, intervals, records."""
