"""Real images in: one loader for every data set."""
