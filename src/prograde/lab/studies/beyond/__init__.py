"""`prograde beyond`: problems on which forward gradients are the only way, or plainly the better
one.

A problem is a folder: `run.measure(full, display)` takes all figures once, and `report` makes the
sentences (`conclusion`), the tables (`tables`) and the picture (`draw`) from them. A line here adds
it.
"""

PROBLEMS = ["newton", "ode", "control", "horizon", "stream", "hyper"]
