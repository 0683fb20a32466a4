"""`prograde compare`: gradient estimators compared on one model."""
