"""Shared fixtures: tiny tokenizers of three kinds, a tiny artifact, and seeded everything."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; torch's threads would wait for each other

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("tests", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def seeded():
    import random

    import numpy as np

    random.seed(0)
    np.random.seed(0)
    try:
        import torch
    except ImportError:
        return
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory):
    """A tiny exported pair (fp32 and int8, models kept) with a passage format."""
    from tests.artifacts import export_tiny

    return export_tiny(tmp_path_factory.mktemp("artifact") / "tiny")
