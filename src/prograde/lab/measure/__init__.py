"""Measurement: `timing` of programs that take turns, and `memory` of a step."""
