"""`prograde replay-speed`: times training with a replay log, and replaying the log."""

LEAST_TURNS = 4
"""Least number of turns: two are not timed, replaying is one behind, and one is timed."""
