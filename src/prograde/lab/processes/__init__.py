"""Processes: `launch` starts them, `workers` lets them work together, `requests` asks one."""
