"""Measuring: `timing` for programs that take turns, `memory` for what a step needs."""
