"""Read files of records as they are written: sources, columns, messages, values."""
