import pytest
import torch.distributed

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("torch was built without torch.distributed and gloo", allow_module_level=True)
