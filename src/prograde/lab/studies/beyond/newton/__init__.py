"""Newton's method in a loop that ends when it has converged: five numbers of a solar cell, and a
network in equilibrium.
"""
