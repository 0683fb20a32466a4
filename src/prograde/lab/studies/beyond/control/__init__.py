"""A runner learns to run at a commanded speed, through the events of its simulation."""
