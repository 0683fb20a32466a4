"""Hypergradients: derivatives of the held-out loss by the hyperparameters of a training run.

Forward mode computes them along the whole run.
"""
