"""Reads work and memory off the text of a compiled program."""
