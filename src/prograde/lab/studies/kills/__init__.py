"""`prograde kills`: kills workers of a training run, and checks that nothing is lost."""
