"""Charts, prompts with responses, thumbnails and templates of all pages."""
