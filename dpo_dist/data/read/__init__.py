"""Read records from files: sources, columns, messages, values."""
