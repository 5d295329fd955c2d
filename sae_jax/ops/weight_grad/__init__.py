"""Gradients of encoder and decoder rows: sums over the pairs of a latent."""
