"""`forward_mode`: a function whose derivatives of any order run forward.

- `pushforward`: the primitive that carries value and tangent, and what reverse mode makes of it;
- `wrapper`: trees, static arguments and options around it.
"""

from prograde._forward_mode.wrapper import forward_mode

__all__ = ["forward_mode"]
