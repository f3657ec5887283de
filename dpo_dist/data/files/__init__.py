"""Records as they are in files and Hub datasets."""
