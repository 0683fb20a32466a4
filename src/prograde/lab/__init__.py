"""Experiments with prograde that use its public names alone. Start with `prograde --help`."""
