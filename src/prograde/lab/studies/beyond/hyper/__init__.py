"""Hypergradients: the derivative of the held-out loss by the hyperparameters, through a whole
training run, forward.
"""
