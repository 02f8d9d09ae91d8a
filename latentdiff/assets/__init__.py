"""What comes with the package, by name: models and pictures. In a config `builtin:NAME` means one of them."""

from pathlib import Path

from ..errors import check_choice

ASSETS = Path(__file__).resolve().parent
BUILTIN = "builtin:"
INDEX = "model_index.json"  # a model's folder has one
EMOJI_STYLE = r"^an? (3d|noto) emoji of "  # what the captions of the shipped pictures begin with; the rest is a concept


def shipped_models() -> list[str]:
    """Names of the models."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{INDEX}"))


def shipped_pictures() -> list[str]:
    """Names of the captioned pictures."""
    return sorted({path.parent.name for path in ASSETS.glob("*/*.parquet")})


def pictures_folder(source: str) -> str:
    """The folder that a `data.source` means: one that ships, or what it says.

    Raises:
        LatentDiffError: none of that name ships.
    """
    return _folder("data set", source, shipped_pictures())


def part_folder(pretrained: str, part: str) -> str:
    """The folder that a `pretrained` means: a part of a model that ships, or what it says.

    Args:
        pretrained: `builtin:NAME`, or anything else.
        part: `vae`, `unet` or `text_encoder`.

    Raises:
        LatentDiffError: none of that name ships.
    """
    return _folder("model", pretrained, shipped_models(), part)


def _folder(kind: str, said: str, names: list[str], part: str = "") -> str:
    if not said.startswith(BUILTIN):
        return said
    name = said.removeprefix(BUILTIN)
    check_choice(f"built-in {kind}", name, names)
    return str(ASSETS / name / part)
