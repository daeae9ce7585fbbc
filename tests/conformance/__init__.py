"""Every generic behaviour that PyTorch asserts of its own optimizers, asserted of the ones here."""
