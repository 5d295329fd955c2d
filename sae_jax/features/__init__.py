"""The feature table, between probing and the browser."""
