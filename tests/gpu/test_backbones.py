"""Every native backbone on one GPU says what the untouched model says there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.qwen.kinds import DTYPES, KINDS, differences, load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_the_untouched_forward(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A batch of clips takes other kernels than one clip, so that last bits may differ."""
    loaded = load(name, KINDS[name].save(tmp_path))
    loaded.model.cuda()
    near = 1e-4 if dtype == torch.float32 else 0.02
    cases = list(differences(name, loaded, dtype))
    assert max(one.difference for one in cases) < near, cases
    assert min(least for one in cases for least in one.controls) > near
