"""Weighted sums of decoder rows, and the gradient of the weights."""
