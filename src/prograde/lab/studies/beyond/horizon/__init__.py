"""Long horizons: the gradient of a loss along a trajectory, at a memory that does not grow with its
length.
"""
