"""Charts, prompts with responses, and templates, which all pages share."""
