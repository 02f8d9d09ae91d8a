"""The pictures of a run: opened, and a line about each that is left out or not used as one might expect."""

from collections.abc import Callable, Sequence
from unicodedata import normalize

from text_encoder import TextEncoder

from ..data.left_out import LeftOut
from ..data.sources import Source, open_source
from ..errors import several
from .launch import Launch

FEW_HELD_OUT = 8

Sources = tuple[Source, Source]  # the training pictures and those held out


def open_pictures(run: Launch) -> Sources:
    """Open the training pictures and the held-out ones, and say what is left out and which lack captions.

    What `data.json` is to say of them is kept in `run.pictures` until a training begins, as the run may be refused.
    """
    left_out, where = LeftOut(), run.config.data.source
    sources = open_source(run.config.data, left_out)
    for line in left_out.lines():
        run.say_once(f"{where}: {line}")
    if left_out.names:
        run.say_once(f"{where}: `latentdiff data check` writes down all that is left out")
    without = _say_which(run, sources, "have no caption", lambda captions: not captions)
    if (held_out := len(sources[1])) < FEW_HELD_OUT:
        run.say_once(f"{where}: only {held_out} of {sum(map(len, sources))} pictures held out, so that the validation "
                     "loss says little; data.validation_share sets how many")  # fmt: skip
    counts = [{"pictures": len(source), "without_caption": number}
              for source, number in zip(sources, without, strict=True)]  # fmt: skip
    run.pictures.update({"source": where, "training": counts[0], "held-out": counts[1],
                         "left_out": list(left_out.lines())})  # fmt: skip
    return sources


def say_what_is_cut_off(run: Launch, sources: Sources, encoder: TextEncoder) -> None:
    """Say which pictures have captions longer than the text encoder reads."""
    limit = encoder.max_length

    def is_cut(captions: Sequence[str]) -> bool:
        long = [normalize("NFC", caption) for caption in captions if 2 * len(caption) > limit]  # most are far shorter
        return bool(long) and any(encoder.lost_tokens(long))

    what = f"have captions of more than {limit} tokens, the text encoder's maximum, and lose the rest"
    _say_which(run, sources, what, is_cut)


def _say_which(run: Launch, sources: Sources, what: str, is_so: Callable[[list[str]], bool]) -> list[int]:
    """Say which pictures of either split are so; return how many."""
    counts = []
    for name, source in zip(("training", "held-out"), sources, strict=True):
        pairs = zip(source.names(), source.all_captions(), strict=True)
        found = [picture for picture, captions in pairs if is_so(captions)]
        counts.append(len(found))
        if found:
            run.say_once(f"{run.config.data.source}: {len(found)} of {len(source)} {name} pictures {what}: "
                         f"{several(found)}")  # fmt: skip
    return counts
