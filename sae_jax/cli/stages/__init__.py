"""Each stage's flags, and its work as they say."""
