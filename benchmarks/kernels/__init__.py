"""Time, memory and bandwidth of one optimizer step, beside other optimizers on the same tensors."""
