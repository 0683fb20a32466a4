"""`prograde links`: steps of workers that are joined by a slow link, and a model of their costs."""

PARTS = ("link", "updates", "smollm2", "mlp", "scaling")
"""The parts of the study, which are the names of its records."""
