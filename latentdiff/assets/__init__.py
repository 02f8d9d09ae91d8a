"""Models and data sets that ship with the package; `builtin:NAME` refers to one of them in a config."""

from pathlib import Path

from ..errors import check_choice

ASSETS = Path(__file__).resolve().parent
BUILTIN = "builtin:"
INDEX = "model_index.json"  # every model folder has one
EMOJI_STYLE = r"^an? (3d|color|flat|noto) emoji of "  # prefix of the shipped captions; the rest names a concept


def shipped_models() -> list[str]:
    """Return the names of the shipped models."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{INDEX}"))


def shipped_pictures() -> list[str]:
    """Return the names of the shipped data sets."""
    return sorted({path.parent.name for path in ASSETS.glob("*/*.parquet")})


def pictures_folder(source: str) -> str:
    """Return the folder of a shipped data set for `builtin:NAME`, and any other `data.source` unchanged."""
    return _resolve("data set", source, shipped_pictures())


def part_folder(pretrained: str, part: str) -> str:
    """Return the folder of a part of a shipped model for `builtin:NAME`, and any other `pretrained` unchanged."""
    return _resolve("model", pretrained, sorted(path.parts[-3] for path in ASSETS.glob(f"*/{part}/config.json")), part)


def _resolve(kind: str, source: str, names: list[str], part: str = "") -> str:
    if not source.startswith(BUILTIN):
        return source
    name = source.removeprefix(BUILTIN)
    check_choice(f"built-in {kind}", name, names)
    return str(ASSETS / name / part)
