"""Streaming writer for safetensors files, with one tensor on the host at a time.

The library's `save_file` needs all of them at once, and a hash of the file it wrote would not reveal a faulty disk.
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
    """The bytes of a safetensors file; raises unless the format supports every tensor's dtype, layout and name."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        # Largest elements first, as in the library: every tensor then starts at a multiple of its element size.
        self._tensors = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
        self._header = self._make_header()
        self.size = len(self._header) + sum(_size(tensor) for _, tensor in self._tensors)  # bytes

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the file from start to end, copying each tensor to the host only when its turn comes."""
        yield self._header
        for _, tensor in self._tensors:
            yield _bytes(tensor)

    def _make_header(self) -> bytes:
        """Length of the JSON (8 bytes, little-endian), then the JSON: dtype, shape and offsets of each tensor."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, tensor in self._tensors:
            if tensor.dtype not in DTYPES or tensor.layout is not torch.strided or name in entries:
                raise LatentDiffError(f"tensor {name!r} ({tensor.dtype}, {tensor.layout}) is not valid in safetensors")
            end = start + _size(tensor)
            entry = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
            entries[name], start = entry, end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # aligns the tensor data within the file
        return len(text).to_bytes(8, "little") + text


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(tensor: Tensor) -> memoryview:
    """The elements in row-major order; flattened first, because a 0-d tensor cannot be viewed as bytes."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
