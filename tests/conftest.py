"""Fixtures that several test files share."""

import pytest
import torch


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)
