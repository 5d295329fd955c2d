"""Adam with unit rows and their moving average, in one pass over the rows."""
