import torch

# Tiny tensors gain nothing from threads, and test processes side by side lose much by them.
torch.set_num_threads(1)
