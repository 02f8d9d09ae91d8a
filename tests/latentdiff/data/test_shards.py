"""Arrays on disk: written by many processes, resumed, verified, keyed by their inputs."""

import pickle

import numpy as np
import pytest

from latentdiff import LatentDiffError
from latentdiff.data.shards import Shards, SingleProcess, changed_inputs, remove_others

SHARD_ROWS = 4


class Process:
    """One of several processes, run one after the other."""

    def __init__(self, index, count):
        self.process_index, self.num_processes = index, count

    def wait_for_everyone(self):
        pass


def squares(computed=None):
    def compute(ranges, progress):
        for rows in ranges:
            if computed is not None:
                computed.append(rows)
            yield {
                "square": np.array([[row**2, row] for row in rows], np.float32),
                "odd": np.array([r % 2 for r in rows], np.uint8),
            }

    return compute


def built(folder, inputs=None, rows=10, computed=None):
    shards = Shards(folder, inputs or {"of": "numbers"}, rows, SHARD_ROWS)
    shards.build(squares(computed), SingleProcess())
    return shards


def test_rows_are_read_back(tmp_path):
    shards = built(tmp_path)
    assert [shards["square", row].tolist() for row in (0, 3, 4, 9)] == [[0, 0], [9, 3], [16, 4], [81, 9]]
    assert shards.column("odd").tolist() == [0, 1] * 5


def test_rows_own_their_memory(tmp_path):
    shards = built(tmp_path)
    shards["square", 1][:] = 0
    assert shards["square", 1].tolist() == [1, 1]


def test_the_second_build_computes_nothing(tmp_path):
    built(tmp_path)
    computed = []
    built(tmp_path, computed=computed)
    assert computed == []


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "remove checksum", "spoil checksum"])
def test_only_a_damaged_shard_is_computed_again(tmp_path, damage):
    shards = built(tmp_path)
    path = shards.folder / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    _ = shards["square", 5]  # the old file is mapped
    if damage == "truncate":
        path.write_bytes(data[:-1])
    elif damage == "flip":
        data[-3] ^= 1
        path.write_bytes(data)
    elif damage == "remove":
        path.unlink()
    else:
        path.with_suffix(".json").write_text("[]") if damage == "spoil checksum" else path.with_suffix(".json").unlink()
    computed = []
    again = built(tmp_path, computed=computed)
    assert computed == [range(4, 8)]
    assert [again["square", row].tolist() for row in range(4, 8)] == [[row**2, row] for row in range(4, 8)]


def test_shards_of_a_killed_process_are_computed_later(tmp_path):
    shards = Shards(tmp_path, {"of": "numbers"}, 10, SHARD_ROWS)

    def dies(ranges, progress):
        yield next(squares()(ranges, progress))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.build(dies, SingleProcess())
    computed = []
    built(tmp_path, computed=computed)
    assert computed == [range(4, 8), range(8, 10)]


def test_processes_share_the_work(tmp_path):
    computed = {}
    for index in (1, 0):
        shards = Shards(tmp_path, {"of": "numbers"}, 10, SHARD_ROWS)
        computed[index] = []
        if index == 1:
            with pytest.raises(LatentDiffError, match="shard 0 is missing"):  # there is no barrier in this test
                shards.build(squares(computed[1]), Process(1, 2))
        else:
            shards.build(squares(computed[0]), Process(0, 2))
    assert computed == {1: [range(4, 8)], 0: [range(4), range(8, 10)]}
    assert shards["square", 7].tolist() == [49, 7]


def test_other_inputs_give_another_array(tmp_path):
    first, second = built(tmp_path), Shards(tmp_path, {"of": "characters"}, 10, SHARD_ROWS)
    assert first.folder != second.folder
    assert changed_inputs(tmp_path, second.inputs) == ["of"]
    second.build(squares(), SingleProcess())
    remove_others(tmp_path, {second.folder.name})
    assert list(tmp_path.iterdir()) == [second.folder]
    assert not first.folder.exists()
    assert second["square", 2].tolist() == [4, 2]


def test_a_worker_maps_the_files_itself(tmp_path):
    shards = built(tmp_path)
    _ = shards["square", 0]
    assert pickle.loads(pickle.dumps(shards))["square", 9].tolist() == [81, 9]  # noqa: S301


def test_an_unwritable_folder_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LatentDiffError, match="cannot be written"):
        built(tmp_path / "file")
