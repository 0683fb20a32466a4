"""Processes: `launch` starts them and watches over them, `workers` is how they agree."""
