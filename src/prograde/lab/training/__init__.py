"""Training: the one training loop, with the estimator as a value, and the search of learning rates."""
