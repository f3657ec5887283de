"""Tools that look at data, models and runs: a folder for each verb; `shared` has code that several use."""
