"""Pictures that do not belong to the others."""

import pytest
import torch

from latentdiff import LatentDiffError
from latentdiff.evaluation.oddness import oddness


def test_odd_pictures_are_found_on_either_side():
    """Dear and cheap ones of usual complexity, and a simple one that costs what it should; then white squares."""
    png = torch.randn(40, dtype=torch.float64).mul(0.4).exp()
    bits = 1.5 * png**0.6 * torch.randn(40, dtype=torch.float64).mul(0.03).exp()
    bits[3] *= 1.5
    bits[7] /= 1.5
    png[9], bits[9] = 0.02, 1.5 * 0.02**0.6
    found = oddness(bits, png)
    assert set(found.topk(3).indices.tolist()) == {3, 7, 9}
    assert (found > 5).sum() == 3
    assert (oddness(2 * bits, 3 * png) - found).abs().max() < 1e-9
    bits[36:], png[36:] = 0.4, 0.01
    assert oddness(bits, png)[36:].min() > oddness(bits, png)[10:36].max()
    with pytest.raises(LatentDiffError, match="expected above 0"):
        oddness(bits - 1, png)
    with pytest.raises(LatentDiffError, match="at least 8"):
        oddness(bits[:5], png[:5])
