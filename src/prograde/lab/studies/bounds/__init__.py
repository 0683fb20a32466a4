"""`prograde bounds`: what bounds a structured step, and ways round it that did not help."""
