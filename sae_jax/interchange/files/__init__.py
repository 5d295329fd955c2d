"""Files of tensors that others wrote; no code that they hold is ever run."""
