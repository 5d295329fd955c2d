"""Formats and families that subjects are read from."""
