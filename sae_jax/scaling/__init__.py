"""Scaling laws: from a table of finished runs to fits with intervals.

Letters of axes here: F fits that are solved at once, R rows (finished runs, or
cells), P coefficients of a form, J terms of it.
"""
