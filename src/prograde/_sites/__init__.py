"""Sites: the pre-activations of a program, found, perturbed, and the weights behind them credited.

- `examples`: along which axis of every value the examples lie, and `layout`: also where they share
  it with others;
- `records`: what is kept of a site, and the weight gradients that follow from a cotangent at each
  of them;
- `labels`: the axis of the examples, passed on by each operation;
- `independence`: whether the noise of one example can reach the loss of another;
- `interpreter`: runs a program with a perturbation injected at every site;
- `reach`: which losses a perturbation reaches, and along which axes.

A site is where a weight meets an activation, x @ W + b. Its estimated cotangent gives the gradients
of W and b by the transpose of that one operation; nothing travels from layer to layer.
"""

from prograde._sites.examples import ExamplesError
from prograde._sites.interpreter import Program, Run
from prograde._sites.reach import Reach, reach_of
from prograde._sites.records import Site, collect, leaves_of, sites, tangent_axes, with_cotangents

__all__ = [
    "ExamplesError",
    "Program",
    "Reach",
    "Run",
    "Site",
    "collect",
    "leaves_of",
    "reach_of",
    "sites",
    "tangent_axes",
    "with_cotangents",
]
