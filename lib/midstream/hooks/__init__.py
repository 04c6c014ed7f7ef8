"""See and change what happens between a model's layers and along its tokens, on unmodified models."""

from midstream.hooks.attend import AttentionAt, attend
from midstream.hooks.kv import kv
from midstream.hooks.sites import PARTS, Site, Sites, Stack, sites

__all__ = ["PARTS", "AttentionAt", "Site", "Sites", "Stack", "attend", "kv", "sites"]
