"""`prograde beyond`: the problems on which forward gradients are the only way, or plainly the better one.

- `experiment`: what each of them is; `newton`, `ode`, `control`, `horizon`, `stream`, `hyper`: one each;
- `timing`: compiled programs that take turns;
- `run`, `report`: measuring, records, and the page made from them.
"""

EXPERIMENTS = {
    "newton": "Newton",
    "ode": "ODEFit",
    "control": "Control",
    "horizon": "Horizon",
    "stream": "Stream",
    "hyper": "Hyper",
}
"""The class of each experiment, in the module of its name."""
