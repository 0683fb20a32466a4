"""`prograde replay-speed`: training with a replay log, and the same parameters from the log."""

LEAST_TURNS = 4
"""Two turns are not timed, replaying is one turn behind, and one is left to be timed."""
