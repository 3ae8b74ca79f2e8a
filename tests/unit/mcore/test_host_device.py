"""The stand-in for CUDA leaves alone what is not CUDA."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.costly
def test_a_device_context_first_used_under_the_stand_in_works():
    # In a fresh process: torch collects the factories of ``with torch.device`` at the first use of one.
    code = """
import torch
from megatron_groupdpo.mcore import host_device
host_device.activate()
with torch.device("meta"):
    print(torch.arange(2).device, torch.ones(1).device, torch.tensor(0).device)
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["meta", "meta", "meta"]
