"""What a compiled program says of its work and its memory."""
