"""Scaling laws: how far fits can be trusted."""
