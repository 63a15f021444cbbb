"""Training data that a model helps to make: hard negatives, and what a judge says of them."""
