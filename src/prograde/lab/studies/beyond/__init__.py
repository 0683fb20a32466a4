"""`prograde beyond`: problems on which forward gradients are the only way, or plainly the better one.

One line here and one module add a problem.
"""

PROBLEMS = {
    "newton": "Newton",
    "ode": "ODEFit",
    "control": "Control",
    "horizon": "Horizon",
    "stream": "Stream",
    "hyper": "Hyper",
}
"""The class of each problem, in the module of its name."""
