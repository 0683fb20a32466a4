"""Learning from a stream: online learners compared with truncated backprop, in equal time."""
