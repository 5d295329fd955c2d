"""Encoding, the choice of active latents and decoding, with one backward."""
