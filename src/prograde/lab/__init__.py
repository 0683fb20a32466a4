"""Experiments on top of prograde, by its public names only. The command line is `prograde --help`."""
