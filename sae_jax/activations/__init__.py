"""Activations: text through a subject into a store, and batches out of it.

corpus gives documents, tokenized contexts of them; harvest runs the subject and
writer stores what it says; store reads that, and feed orders it.
"""
