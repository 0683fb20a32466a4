"""`prograde basics`: the costs that the project promises to keep to."""
