"""Code that several tools share: sampling and judges, pages, tables, findings, intervals, records."""
