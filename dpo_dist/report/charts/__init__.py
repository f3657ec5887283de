"""Charts: line charts and bars as inline SVG, images of training and evaluation."""
