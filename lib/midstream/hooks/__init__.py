"""See and change what happens between a model's layers and along its tokens, on unmodified models."""

from midstream.hooks.attend import AttentionAt, attend
from midstream.hooks.dispatch import At
from midstream.hooks.kv import kv
from midstream.hooks.prune import prune
from midstream.hooks.read import Forward, Reading, read
from midstream.hooks.readout import readout
from midstream.hooks.route import route
from midstream.hooks.sites import PARTS, Site, Sites, Stack, sites
from midstream.hooks.write import write

__all__ = [
    "PARTS",
    "At",
    "AttentionAt",
    "Forward",
    "Reading",
    "Site",
    "Sites",
    "Stack",
    "attend",
    "kv",
    "prune",
    "read",
    "readout",
    "route",
    "sites",
    "write",
]
