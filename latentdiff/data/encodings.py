"""What a finished VAE's pictures are read for, in one pass: its latents' statistics, the decoder's error, the cache.

The encoder's output is kept before `quant_conv`, the only layer of the encoder that normalizing the latents changes.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vae import VAE, DiagonalGaussian

from ..device import without_tf32
from ..sections import DataConfig
from .cache import (
    TRANSFORM_KEYS,
    Encoded,
    PictureBatch,
    PictureBatches,
    encode_batch_size,
    encode_pictures,
    in_batches,
    weights_digest,
)
from .order import random_stream
from .shards import SHARD, Arrays, Processes, Progress, Shards, SingleProcess, remove_others
from .sources import Source

MAX_ERROR_PICTURES = 1_000  # for the decoder's scale
BATCHES_PER_SHARD = 4  # that are lost with a killed process; few, so that all processes have work
NOT_MEASURED = -1.0


class Encodings:
    """The encoder's outputs for every picture, or every `stride`-th, and the decoder's error on up to 1,000 of them.

    Args:
        folder: where they are kept.
        source: the pictures, of which the file sizes and modification times count.
        vae: with the encoder and decoder; folding statistics into it leaves the encodings valid.
        config: the transform to pixels.
        flips: also encode the mirrored pictures.
        stride: distance of the pictures that are encoded.
        seed: of the noise with which the decoder's error is measured.
        loss: l1 or l2, its kind.
        workers: processes that read the pictures; 0: as many as are useful.
    """

    def __init__(
        self, folder: Path, source: Source, vae: VAE, config: DataConfig, *, flips: bool, stride: int, seed: int,
        loss: str, workers: int = 0,
    ) -> None:  # fmt: skip
        self.source, self.vae, self.config, self.workers = source, vae, config, workers
        self.stride, self.seed, self.loss = stride, seed, loss
        self.num_flips = 2 if flips else 1
        self.pictures = range(0, len(source), stride)
        self.error_stride = max(1, math.ceil(len(self.pictures) / MAX_ERROR_PICTURES))
        self.batch_size = encode_batch_size(config.image_size)
        inputs = {
            "kind": "encodings",
            "version": 1,
            "encoder": weights_digest(vae.encoder),
            "decoder": weights_digest(vae.decoder),
            "vae": replace(vae.config, scale_factor=1.0, shift_factor=0.0).to_diffusers(),  # which folding changes
            "transform": config.model_dump(mode="json", include=TRANSFORM_KEYS),
            "pictures": source.stat_fingerprint(),
            "flips": self.num_flips,
            "stride": stride,
            "errors": [self.error_stride, seed, loss],
        }
        # A new batch begins wherever a shard of the cache does, so that both encode the same batches.
        rows = BATCHES_PER_SHARD * self.batch_size
        self.shards = Shards(folder, inputs, len(self.pictures), SHARD if SHARD % rows else rows)
        self.good: NDArray[np.uint8] = np.zeros(0, dtype=np.uint8)  # which pictures could be read

    @property
    def batches(self) -> list[range]:
        """All rows, in the batches that are encoded together."""
        shards = in_batches(range(len(self.pictures)), self.shards.shard_rows)
        return [batch for rows in shards for batch in in_batches(rows, self.batch_size)]

    def build(self, processes: Processes = SingleProcess(), label: str | None = None) -> None:  # noqa: B008
        """Compute what is missing, and delete other encodings in the folder."""
        if processes.process_index == 0:
            remove_others(self.shards.folder.parent, {self.shards.folder.name})
        self.shards.build(self._compute, processes, label)
        self.good = self.shards.column("good")

    def encoded(self, batches: Sequence[range]) -> Iterator[Encoded]:
        """Yield the encoder's outputs for batches of rows, and which pictures could be read."""
        device = next(self.vae.parameters()).device
        for rows in batches:
            outputs = torch.from_numpy(np.stack([self.shards["outputs", row] for row in rows])).to(device)
            yield list(outputs.unbind(1)), torch.from_numpy(self.good[rows.start : rows.stop])

    def summaries(self) -> Iterator[bytes]:
        """Yield what each picture adds to `pictures_digest`."""
        return (row[1 : 1 + row[0]].tobytes() for row in self.shards.column("summaries"))

    def decoder_error(self) -> float:
        """Return the decoder's mean absolute or squared error."""
        errors = self.shards.column("error")
        return float(errors[errors != NOT_MEASURED].mean())

    @torch.inference_mode()
    def seconds(self) -> float:
        """Estimate how long a single process takes to build them, by encoding one batch and decoding one picture.

        Changes nothing, in memory or on disk.
        """
        for number in (1, self.batch_size):  # the first time also includes what is set up only once
            start = time.perf_counter()
            batch = PictureBatches(self.source, self.config, [self.pictures[:number]])[0]
            pixels, outputs = encode_pictures(self.vae, batch, self.num_flips)
            outputs[-1].sum().item()  # waits for the device
            encoded = time.perf_counter()
            self._error(0, pixels[:1], self.vae.posterior_from(outputs[0][:1]))
            decoded = time.perf_counter()
        number_of_errors = len(self.pictures[:: self.error_stride])
        return len(self.batches) * (encoded - start) + number_of_errors * (decoded - encoded)

    @torch.inference_mode()
    def _compute(self, ranges: Sequence[range], progress: Progress) -> Iterator[Arrays]:
        batches = [batch for rows in ranges for batch in in_batches(rows, self.batch_size)]
        pictures = [self.pictures[batch.start : batch.stop] for batch in batches]
        read = PictureBatches(self.source, self.config, pictures).load(self.workers)
        for rows in ranges:
            parts = []
            for batch in in_batches(rows, self.batch_size):
                parts.append(self._encode(batch, next(read)))
                progress(len(batch))
            yield {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _encode(self, rows: range, batch: PictureBatch) -> Arrays:
        pixels, outputs = encode_pictures(self.vae, batch, self.num_flips)
        posterior, errors = self.vae.posterior_from(outputs[0]), np.full(len(rows), NOT_MEASURED)
        for place, row in enumerate(rows):
            if row % self.error_stride == 0 and batch.good[place]:
                one = slice(place, place + 1)
                z = DiagonalGaussian(posterior.mean[one], posterior.logvar[one])
                errors[place] = self._error(self.pictures[row], pixels[one], z)
        stacked = torch.stack(outputs, 1).cpu().numpy()
        return {"outputs": stacked, "good": batch.good.numpy(), "summaries": batch.summaries.numpy(), "error": errors}

    @without_tf32()
    def _error(self, picture: int, pixels: Tensor, posterior: DiagonalGaussian) -> float:
        shape = posterior.mean.shape[1:]
        noise = random_stream(self.seed, "validation", 0, picture).standard_normal(shape, dtype=np.float32)
        z = posterior.reparameterize(torch.from_numpy(noise)[None].to(pixels.device))
        error = pixels - self.vae.decode_z(z)
        return float((error.abs() if self.loss == "l1" else error.square()).double().mean())
