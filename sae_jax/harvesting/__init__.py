"""Harvesting: contexts through a subject into an activation store."""
