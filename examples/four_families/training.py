"""Training any of the four for a fixed number of steps, with averages of the weights; kept on disk once it is done."""

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from adversarial import Adversarial
from autoregressive import Autoregressive
from denoising import Diffusion
from pictures import to_pixels
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from variational import Variational

LAST = 5  # checkpoints at the last five twentieths of a run


class Recipe(NamedTuple):
    """How a family is trained; `steps` take about two minutes of a core of the machine of docs/four-families.md."""

    model: type[nn.Module]
    steps: int
    batch: int
    learning_rate: float


RECIPES = {
    "autoregressive": Recipe(Autoregressive, 160, 16, 2e-3),
    "diffusion": Recipe(Diffusion, 480, 64, 3e-3),
    "VAE": Recipe(Variational, 540, 64, 1e-3),
    "GAN": Recipe(Adversarial, 220, 64, 2e-4),
}


class Trained(NamedTuple):
    """A trained model: with averaged weights, and as it was at the last checkpoints."""

    average: Any
    checkpoints: list[Any]
    seconds: float


def train(name: str, train_levels: Tensor, seed: int, steps: int, folder: Path) -> Trained:
    """Train a family, or read what an earlier call left in the folder, and say how long the training took."""
    recipe, path = RECIPES[name], folder / f"{name}-{steps}-{seed}.safetensors"
    torch.manual_seed(seed)
    model = recipe.model()
    if not path.exists():
        began = time.process_time()
        snapshots = dict(_run(model, recipe, train_levels, steps))
        tensors = {
            f"{when}/{key}": value.contiguous() for when, state in snapshots.items() for key, value in state.items()
        }
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, {"seconds": str(time.process_time() - began)})
        partial.rename(path)
    tensors = load_file(path)

    def at(when: str) -> nn.Module:
        found = copy.deepcopy(model)
        found.load_state_dict(
            {key.split("/", 1)[1]: value for key, value in tensors.items() if key.startswith(f"{when}/")}
        )
        return found.eval().requires_grad_(False)

    return Trained(at("average"), [at(str(number)) for number in range(LAST)], _seconds(path))


def _run(model: nn.Module, recipe: Recipe, train_levels: Tensor, steps: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Take all steps; yield the weights at the last checkpoints, then their average over a tenth of the run."""
    if isinstance(model, Diffusion):
        model.network.measure(to_pixels(train_levels))
    update = _updates(model, recipe, steps)
    average = copy.deepcopy(model)
    marks = {round(steps * (1 - number / 20)): str(LAST - 1 - number) for number in range(LAST)}
    for step in range(1, steps + 1):
        batch = train_levels[torch.randint(len(train_levels), (recipe.batch,))]
        loss = update(batch, step)
        if step % max(steps // 5, 1) == 0:
            print(f"{type(model).__name__}: step {step} of {steps}, loss {loss:.3f}", flush=True)
        rate = max(1 / step, min(1.0, 10 / steps))
        with torch.no_grad():
            for kept, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                if kept.is_floating_point():
                    kept.lerp_(new, rate)
                else:
                    kept.copy_(new)
        if step in marks:
            yield marks[step], copy.deepcopy(model.state_dict())
    yield "average", average.state_dict()


def _updates(model: Any, recipe: Recipe, steps: int) -> Any:
    """Return the function (batch, step) -> loss that takes a training step."""
    if isinstance(model, Adversarial):
        first, second = (torch.optim.Adam(part.parameters(), recipe.learning_rate, betas=(0.0, 0.99))
                         for part in (model.discriminator, model.generator))  # fmt: skip

        def play(batch: Tensor, step: int) -> float:
            loss = model.discriminator_loss(batch, step)
            _descend(first, loss)
            _descend(second, model.generator_loss(len(batch)))
            return loss.item()

        return play
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=steps + 1, pct_start=0.1, cycle_momentum=False
    )

    def descend(batch: Tensor, step: int) -> float:
        loss = model.loss(batch)
        nn.utils.clip_grad_norm_(_descend_gradients(optimizer, loss), 1.0)
        optimizer.step()
        rate.step()
        return loss.item()

    return descend


def _descend_gradients(optimizer: torch.optim.Optimizer, loss: Tensor) -> list[nn.Parameter]:
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    _descend_gradients(optimizer, loss)
    optimizer.step()


def _seconds(path: Path) -> float:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return float(file.metadata()["seconds"])
