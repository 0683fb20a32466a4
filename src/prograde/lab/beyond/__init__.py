"""`prograde beyond`: the problems on which forward gradients are the only way, or plainly the better one; one file each."""
