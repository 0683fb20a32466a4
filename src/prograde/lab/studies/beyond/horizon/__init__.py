"""Long horizons: the gradient of a loss along a trajectory, at constant memory."""
