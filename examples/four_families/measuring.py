"""What is measured of each family, into one dictionary that JSON can hold."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from measures import Space, frechet_distance, precision_recall_coverage, sharpness
from pictures import Pictures, bits_per_dimension
from torch import Tensor
from training import RECIPES, Trained, train

DRAWS, FEW = 500, 125  # of the finished model; of a checkpoint or a short run, whose diffusion takes 25 steps
SEEDS, SHORT = 3, 6  # short runs, of a sixth of the steps each


class Reference:
    """Real pictures to compare with, and the comparison."""

    def __init__(self, pictures: Pictures) -> None:
        order = torch.randperm(len(pictures.train), generator=torch.Generator().manual_seed(0))
        self.space = Space(pictures.train)
        count = min(DRAWS, len(order) // 2)
        self.first, self.second = (pictures.train[part] for part in (order[:count], order[count : 2 * count]))
        self.real = self.space(self.first)

    def distance(self, levels: Tensor) -> float:
        """Return the Fréchet distance of pictures to the first real ones."""
        return frechet_distance(self.real, self.space(levels))

    def quality(self, levels: Tensor) -> dict[str, float]:
        """Compare pictures with the first real ones."""
        precision, recall, coverage = precision_recall_coverage(self.real, self.space(levels))
        return {"Fréchet distance": self.distance(levels), "precision": precision, "recall": recall,
                "coverage": coverage, "sharpness": sharpness(levels) / sharpness(self.first)}  # fmt: skip


def measure(name: str, pictures: Pictures, reference: Reference, seed: int, scale: float, folder: Path) -> Any:
    """Return all numbers of a family and the trained model; what is in the folder already is not done again."""
    steps = max(int(RECIPES[name].steps * scale), 20)
    trained = train(name, pictures.train, seed, steps, folder)
    path = folder / f"{name}-{steps}-{seed}.json"
    if not path.exists():
        found = _measure(name, pictures, reference, seed, steps, trained, folder)
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8")), trained.average


def _measure(name: str, pictures: Pictures, reference: Reference, seed: int, steps: int, trained: Trained,
             folder: Path) -> dict[str, Any]:  # fmt: skip
    model = trained.average
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "batch": RECIPES[name].batch,
        "training seconds": trained.seconds,
    }
    found["density"], found["error"] = density(name, model, pictures.held_out)
    began = time.process_time()
    drawn = model.draw(DRAWS, torch.Generator().manual_seed(seed))
    found["seconds for 500"] = time.process_time() - began
    began = time.process_time()
    for each in range(3):
        model.draw(1, torch.Generator().manual_seed(each))
    found["seconds for one"] = (time.process_time() - began) / 3
    found |= reference.quality(drawn)
    found["checkpoints"] = [reference.distance(few(name, each, seed)) for each in trained.checkpoints]
    short = [train(name, pictures.train, 100 + number, max(steps // SHORT, 20), folder) for number in range(SEEDS)]
    found["seeds"] = [reference.distance(few(name, each.average, seed)) for each in short]
    return found


def few(name: str, model: Any, seed: int) -> Tensor:
    """Draw the smaller number of pictures, by fewer steps of diffusion."""
    generator = torch.Generator().manual_seed(seed)
    return model.draw(FEW, generator, 25) if name == "diffusion" else model.draw(FEW, generator)


def density(name: str, model: Any, held_out: Tensor) -> tuple[dict[str, float], float]:
    """Return bits per dimension of held-out pictures, by kind, and the standard error over pictures of the last."""
    generator = torch.Generator().manual_seed(0)
    if name == "GAN":
        return {}, 0.0
    if name == "VAE":
        kinds = dict(zip(("ELBO", "IWAE-64"), model.log_prob(held_out, generator), strict=True))
    elif name == "diffusion":
        kinds = {"ELBO": model.log_prob(held_out, generator)}
    else:
        kinds = {"exact": model.log_prob(held_out)}
    error = list(kinds.values())[-1].std() / len(held_out) ** 0.5
    return {kind: bits_per_dimension(-nats) for kind, nats in kinds.items()}, bits_per_dimension(error)
