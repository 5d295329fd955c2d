"""Activations: text through a subject into a store, and batches out of it.

corpus gives documents, harvest writes a store, store reads it, feed orders it.
"""
