"""Exact top-k along the last axis, on one shard and across shards."""
