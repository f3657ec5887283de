"""Tools that look at data, models and runs: a folder for each verb; the others have what several use."""
