"""Posteriors of two differential equations, sampled by NUTS through diffrax's adaptive solver."""
