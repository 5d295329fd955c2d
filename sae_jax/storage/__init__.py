"""Local paths and URLs of buckets: reading, writing and claiming them."""
