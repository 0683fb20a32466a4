"""Processes: `launch` starts and watches them, `workers` lets them work together."""
