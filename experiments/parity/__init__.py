"""Subjects of every family beside transformers."""
