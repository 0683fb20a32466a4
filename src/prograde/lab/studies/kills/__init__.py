"""`prograde kills`: workers of a training run are killed, and nothing may be lost."""
