"""`prograde beyond`: problems where forward gradients are the only way, or clearly the better one.

Each problem is a folder. Its `run.measure(full, display)` measures everything once. Its `report`
makes the sentences (`conclusion`), the tables (`tables`) and the picture (`draw`) from the record.
To add a problem, add its folder and a line here.
"""

PROBLEMS = ["newton", "ode", "posterior", "control", "horizon", "stream", "recall", "hyper"]
