"""Newton's method in a loop that ends at convergence.

Two functions are computed like this: the current of a solar cell, of which five parameters are
fitted, and the output of a network in equilibrium.
"""
