"""`prograde bounds`: what bounds a structured step, and remedies that did not help."""
