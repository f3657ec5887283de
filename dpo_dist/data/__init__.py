"""Preference data: read records from files, encode them as token ids, store them."""
