"""Score pairs with trained models, and say how sure the means are."""
