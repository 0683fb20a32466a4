"""Fits the parameters of a stiff, oscillating reaction through diffrax's adaptive solver."""
