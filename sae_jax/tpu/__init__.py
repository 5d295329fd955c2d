"""Facts of TPU chips, and their compiler on machines without one."""
