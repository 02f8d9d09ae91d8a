"""Writing a safetensors file tensor by tensor: one of them at a time in memory, and the hash of what was meant.

The library's `save_file` wants all tensors on the host at once and leaves only the file itself to be hashed, which
would then vouch for whatever the disk made of it.
"""

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..errors import LatentDiffError

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
}  # fmt: skip


class TensorFile:
    """The bytes of a safetensors file with these tensors, of any shapes, strides and devices.

    Raises:
        LatentDiffError: a tensor has a dtype or a name that the format does not know.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        # Wide elements first: each tensor then begins at a multiple of its element size, as the library has it.
        self._tensors = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
        self._header = self._make_header()
        self.size = len(self._header) + sum(_size(tensor) for _, tensor in self._tensors)  # bytes

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The file from beginning to end, a tensor at a time; each is brought to the host when its turn comes."""
        yield self._header
        for _, tensor in self._tensors:
            yield _bytes(tensor)

    def _make_header(self) -> bytes:
        """Length of the JSON that follows (8 bytes, little-endian); the JSON: dtype, shape and place of each tensor."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, tensor in self._tensors:
            if tensor.dtype not in DTYPES or tensor.layout is not torch.strided or name in entries:
                raise LatentDiffError(f"tensor {name!r} ({tensor.dtype}, {tensor.layout}) has no place in safetensors")
            end = start + _size(tensor)
            place = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
            entries[name], start = place, end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors are aligned in the file, too
        return len(text).to_bytes(8, "little") + text


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(tensor: Tensor) -> memoryview:
    """The elements in row-major order; flat first, because a tensor without dimensions has no view as bytes."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
