import gc

import pytest
import torch

# Tiny tensors gain nothing from threads, and test processes side by side lose much by them.
torch.set_num_threads(1)


def pytest_collection_finish(session: pytest.Session) -> None:
    # Thousands of tests and what they imported stay to the end: no collection need look at them,
    # of which there is one in every training by transformers' Trainer.
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()  # or the libraries among them call it a leak
