"""`prograde beyond`: the problems on which forward gradients are the only way, or plainly the better one.

- `experiment`: what each of them is;
- `newton` (of a `solar_cell`, and a network in `equilibrium`), `ode`, `control` (of a `runner`), `horizon` (and its `horizon_loops`), `stream`, `hyper`
  (and its `hyper_training`): one each;
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
