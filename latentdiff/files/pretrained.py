"""`Pretrained`: models stored as folders in diffusers' layout."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import save_file
from torch import nn

from latentdiff.errors import LatentDiffError, one_line, reraise_as

from .tensors import CONFIG, Device, ModelFiles, check_dtype, read_facts, split_into_files, to_json


class Pretrained(nn.Module):
    """A model stored as a diffusers folder; `config_class` converts its `config.json`."""

    files: ClassVar[ModelFiles]
    config_class: ClassVar[Any]
    known_facts: ClassVar[tuple[str, ...]] = ()
    config: Any
    facts: Mapping[str, str] = MappingProxyType({})  # from the header of the weight files, where diffusers ignores them

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: Device = None, dtype: torch.dtype | None = None, variant: str | None = None
    ) -> Self:
        """Load a model in evaluation mode from a folder in diffusers layout.

        Args:
            folder: has `config.json` and `diffusion_pytorch_model.safetensors`, or shards and their index.
            device: for the weights; the CPU by default.
            dtype: for the weights; float32 by default.
            variant: of the weight files, such as `fp16`; None means the plain files, or the only variant.

        Raises:
            LatentDiffError: the model's own subclass, if a file is missing, damaged or of an unsupported model. No
                weights are allocated before the config and all tensors have been checked.
        """
        folder = Path(folder)
        with reraise_as(cls.files.error):
            dtype = check_dtype(dtype)
            values = cls.files.read_config(folder)
            try:
                with torch.device("meta"):  # shapes only, no memory
                    model = cls(cls.config_class.from_diffusers(values))
            except LatentDiffError as error:
                raise LatentDiffError(f"{folder / CONFIG}: {one_line(error)}") from None
            source = cls.files.find(folder, variant)
            weights = cls.files.read_weights(source, model, device, dtype)
            model.facts = {name: fact for name, fact in read_facts(source).items() if name in cls.known_facts}
        model.load_state_dict(weights, assign=True)
        return model.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]

    def save_pretrained(
        self, folder: str | Path, *, dtype: torch.dtype | None = None, variant: str | None = None,
        max_shard_bytes: int | None = None,
    ) -> None:  # fmt: skip
        """Save the model to a folder that `from_pretrained` and diffusers can load, replacing an earlier save.

        Args:
            dtype: for the written weights; None keeps them as they are.
            variant: part of the names of the weight files, such as `fp16`.
            max_shard_bytes: size above which the weights are split into several files.

        Raises:
            LatentDiffError: the model's own subclass, if an argument is invalid or the folder cannot be written.
        """
        with reraise_as(self.files.error):
            if max_shard_bytes is not None and (type(max_shard_bytes) is not int or max_shard_bytes < 1):
                raise LatentDiffError(f"max_shard_bytes={max_shard_bytes!r}: expected a positive integer")
            single, index = self.files.names(variant)
            dtype = dtype if dtype is None else check_dtype(dtype)
            weights = self.state_dict()
            sizes = {name: tensor.numel() * (dtype or tensor.dtype).itemsize for name, tensor in weights.items()}
            shards = split_into_files(sizes, max_shard_bytes or sum(sizes.values()), single)
            with self.files.staged(Path(folder), variant) as staging:
                for shard, names in shards.items():  # cast one shard at a time; files cannot be channels-last
                    tensors = {name: weights[name].to(dtype or weights[name].dtype).contiguous() for name in names}
                    save_file(tensors, staging / shard, metadata={**self.facts, "format": "pt"})
                (staging / CONFIG).write_text(to_json(self.config.to_diffusers()), encoding="utf-8")
                if len(shards) > 1:
                    places = {name: shard for shard, names in shards.items() for name in names}
                    total = {"total_size": sum(sizes.values())}
                    (staging / index).write_text(to_json({"metadata": total, "weight_map": places}), encoding="utf-8")
