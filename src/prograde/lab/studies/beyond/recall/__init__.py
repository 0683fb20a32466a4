"""A symbol recalled after many distractors: exact online learning, and backprop with windows."""
