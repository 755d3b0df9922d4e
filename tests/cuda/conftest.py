"""What all CUDA tests share: exact fp32 products, and a choice of the vendor's flash."""

import pytest
import torch


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """fp32 products are fp32 products, in the kernels as in eager."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture
def vendor(request):
    """torch's own choice between vendors, narrowed."""
    allowed = torch.backends.cuda
    before = {name: getattr(allowed, name.replace("enable_", "") + "_enabled")() for name in request.param}
    for name, value in request.param.items():
        getattr(allowed, name)(value)
    yield
    for name, value in before.items():
        getattr(allowed, name)(value)
