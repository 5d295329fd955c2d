"""Figures as files, and pages that need no other file and no network."""
