"""Streams: distribution to ranks, checks of their length, and positions for a resume."""

from dstrain.data.streams.dispatch import Dispatched
from dstrain.data.streams.rank_stream import RankStream, StreamLoader, share_of
from dstrain.data.streams.resumable import Resumable
from dstrain.data.streams.share import Share, ShareWithState

__all__ = [
    "Dispatched",
    "RankStream",
    "Resumable",
    "Share",
    "ShareWithState",
    "StreamLoader",
    "share_of",
]
