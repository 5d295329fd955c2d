"""Text: files and packages to documents, and these to contexts of tokens."""
