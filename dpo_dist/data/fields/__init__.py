"""Fields of records: prompt, responses, context; other names for them."""
