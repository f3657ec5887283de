"""Parts of `comparison.html`."""
