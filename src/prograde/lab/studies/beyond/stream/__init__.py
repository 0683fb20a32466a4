"""Learning from a stream: exact and unbiased online learners beside truncated backpropagation, at
equal wall-clock.
"""
