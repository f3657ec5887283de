"""What looks at data, models and runs: a folder for each verb, and what several use in `shared`."""
