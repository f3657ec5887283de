"""What a store contains, whether it is whole, and what of it is unused."""
