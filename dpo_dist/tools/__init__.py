"""What looks at data, models and runs: each tool with its verb. The trainer imports none of it."""
