"""Which device is wrong, from the digests that ranks have computed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ddp_cifar.distributed.collectives import ranks_text

NOT_REPEATED = (
    "the model is not deterministic, or a device is faulty; find out with train.deterministic=true, or the preflight"
)


class Digest(NamedTuple):
    """63-bit hashes of what a rank has computed for a micro-batch. Zeros if it has computed none."""

    images: int = 0
    """The network's input and the targets."""
    gradients: int = 0
    """The gradient of each parameter, of this micro-batch alone, before it is added to others or exchanged."""
    buffers: int = 0
    """All buffers after the forward pass, which starts from those at the start of the step."""


class Verdict(NamedTuple):
    """What a check has found."""

    text: str
    ranks: Sequence[int]
    """The ranks whose device is wrong, or may be. Empty: the device may not be the cause."""
    is_certain: bool = True
    """False if only some of the ranks are wrong."""


def judge_states(states: Sequence[tuple[int, ...]]) -> Verdict:
    """Name the ranks whose weights or optimizer state differ from those of most ranks; all ranks if there is no majority."""
    value, count = Counter(states).most_common(1)[0]
    ranks = [rank for rank, state in enumerate(states) if state != value]
    is_certain = 2 * count > len(states)
    if not is_certain:
        ranks = list(range(len(states)))
    if len({weights for weights, _ in states}) > 1:
        text = f"the weights of {ranks_text(ranks)} differ"
    else:
        text = f"the optimizer state of {ranks_text(ranks)} differs"
    return Verdict(f"{text} from the other ranks'", ranks, is_certain)


def judge(disputes: Mapping[tuple[int, int], tuple[Digest, Digest]], repeated: Sequence[Sequence[Digest]]) -> Verdict:
    """Name the ranks that have computed a micro-batch wrongly.

    `disputes`: by (the rank that has trained on it, the rank that has computed it again), both digests, which differ.
    `repeated`: for each of them, what all ranks have computed for it afterwards. What most of them have is right. If there are
    more than two ranks and no majority, none is named.
    """
    transient: dict[int, str] = {}
    permanent: dict[int, str] = {}
    unknown: dict[int, str] = {}
    for ((trainer, checker), (first, check)), digests in zip(disputes.items(), repeated, strict=True):
        found = [*digests, first, check] if len(digests) == 1 else digests
        right, count = Counter(found).most_common(1)[0]
        if 2 * count > len(found):
            permanent |= {rank: _what(digest, right) for rank, digest in enumerate(digests) if digest != right}
            pair = ((trainer, first), (checker, check))
            transient |= {rank: _what(digest, right) for rank, digest in pair if digest != right}
        elif len(digests) > 2:
            return Verdict("most ranks have computed different bits", [])
        else:
            unknown |= dict.fromkeys([trainer, checker], _what(first, check))
    if permanent:
        return _wrong(permanent, "and does so again")
    if unknown:
        names, what = sorted(unknown), next(iter(unknown.values()))
        return Verdict(f"one of {ranks_text(names)} computes wrong {what}, again and again", names, is_certain=False)
    return _wrong(transient, "but does not do so again: a transient fault")


def _wrong(kinds: Mapping[int, str], again: str) -> Verdict:
    """Name ranks, each with what it has computed wrongly."""
    ranks, what = sorted(kinds), next(iter(kinds.values()))
    return Verdict(f"{ranks_text(ranks)} {'has' if len(ranks) == 1 else 'have'} computed wrong {what}, {again}", ranks)


def _what(one: Digest, other: Digest) -> str:
    if one.images != other.images:
        return "images"
    return "gradients" if one.gradients != other.gradients else "buffers"
