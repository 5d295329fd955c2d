"""This package's autoencoders and those of other trainers, on the same rows."""
