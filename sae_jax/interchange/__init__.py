"""Autoencoders in the formats of others, read and written without torch."""
