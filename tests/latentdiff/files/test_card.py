"""What a model card contains, and what it must not contain."""

import pytest

from latentdiff.files.card import without_folders


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/home/me/pictures", "pictures"), ("~/pictures", "pictures"), ("../me/pictures", "pictures"),
     (r"C:\Users\me\pictures", "pictures"), ("D:/me/pictures", "pictures"), (r"\\server\me\pictures", "pictures"),
     ("builtin:emoji-mini", "builtin:emoji-mini"), ("someone/pictures", "someone/pictures"), (0.5, 0.5)],
)  # fmt: skip
def test_local_paths_are_not_published(path, expected):
    assert without_folders({"data": {"source": path}}) == {"data": {"source": expected}}
