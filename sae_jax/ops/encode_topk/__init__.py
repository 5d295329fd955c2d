"""The encoder's product with an exact top-k of its pre-activations."""
