"""Explanations of latents by a language model, scored on other documents."""
