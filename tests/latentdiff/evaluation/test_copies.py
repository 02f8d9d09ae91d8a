"""The share of copies: a copier through a lossy VAE copies, strangers do not, and near-duplicates change neither."""

import torch

from latentdiff.evaluation.copies import find_nearest, merge_duplicates

SHAPE = (4, 8, 8)


def test_copiers_strangers_and_near_duplicates():
    train, strangers = torch.randn(60, *SHAPE), torch.randn(30, *SHAPE)
    copies = train + 0.2 * torch.randn(60, *SHAPE)
    twice = torch.cat([train, train[:20] + 0.02 * torch.randn(20, *SHAPE)])
    for gallery in (train, twice):
        groups = merge_duplicates(gallery, range(len(gallery)), 0.04)
        assert int(groups.max()) + 1 == 60
        assert groups[60:].equal(groups[:20][: len(gallery) - 60])
        found = find_nearest(copies, gallery, groups)
        assert found.copied.mean() == 1.0
        assert groups[found.rows].equal(groups[:60])
        assert find_nearest(strangers, gallery, groups).copied.mean() == 0.0
    assert find_nearest(copies, twice, torch.arange(80)).copied.mean() < 0.7  # unless they are merged


def test_near_duplicates_of_near_duplicates_and_mirror_images():
    chain = torch.zeros(4, *SHAPE) + torch.arange(4).view(4, 1, 1, 1) * 0.03
    far = torch.randn(1, *SHAPE)
    groups = merge_duplicates(torch.cat([chain, far, far.flip(3)]), [0, 1, 2, 3, 4, 4], 0.04)
    assert groups.tolist() == [0, 0, 0, 0, 1, 1]
