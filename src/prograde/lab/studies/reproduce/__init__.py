"""`prograde reproduce`: the experiments of "Gradients without Backpropagation", run again."""
