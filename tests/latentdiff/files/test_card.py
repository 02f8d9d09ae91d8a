"""What a model card says, and does not say."""

import pytest

from latentdiff.files.card import _without_folders


@pytest.mark.parametrize(
    ("path", "said"),
    [("/home/me/pictures", "pictures"), ("~/pictures", "pictures"), ("../me/pictures", "pictures"),
     (r"C:\Users\me\pictures", "pictures"), ("D:/me/pictures", "pictures"), (r"\\server\me\pictures", "pictures"),
     ("builtin:emoji-mini", "builtin:emoji-mini"), ("someone/pictures", "someone/pictures"), (0.5, 0.5)],
)  # fmt: skip
def test_folders_of_the_machine_stay_there(path, said):
    assert _without_folders({"data": {"source": path}}) == {"data": {"source": said}}
