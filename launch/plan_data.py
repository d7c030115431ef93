"""What the blank-infilling mixture leaves of a step's work: attended pairs and targets, from `data.sampling` alone."""

from data_prep.config import SamplingConfig
from launch.plan_cost import Shares


def mixture_shares(sampling: SamplingConfig) -> Shares:
    """Expected shares of one sample under the mixture's laws.

    gMASK: the generated part is u of the row, u uniform on [a, 1]; the context sees itself, the rest what precedes it:
    1 - u + u^2/2 of the pairs, u of the slots. MASK and sMASK: n segments side by side, the spans a share r of each
    text; a segment's context sees itself, its spans the context and half of themselves.
    """
    if sampling.objective == "causal":
        return Shares(attended=0.5, targets=1.0)
    low = sampling.min_gmask_ratio
    mean, square = (1 + low) / 2, (1 + low + low * low) / 3
    whole = Shares(attended=1 - mean + square / 2, targets=mean)
    spans = sampling.mask_ratio
    context = 1 - spans
    segments = sampling.mask_segments
    short = Shares(attended=(context + spans * spans / 2) / segments, targets=spans)
    weights = {whole: sampling.gmask_share, short: sampling.mask_share}
    total = sum(weights.values())
    return Shares(
        attended=sum(share.attended * weight for share, weight in weights.items()) / total,
        targets=sum(share.targets * weight for share, weight in weights.items()) / total,
    )
