"""Chat templates and tokenizer: texts of a record, their token ids and loss masks."""
