"""See and change what happens between a model's layers and along its tokens, on unmodified models."""

from midstream.hooks.dispatch import At
from midstream.hooks.read import Forward, Reading, read
from midstream.hooks.sites import PARTS, Site, Sites, Stack, sites
from midstream.hooks.write import write

__all__ = ["PARTS", "At", "Forward", "Reading", "Site", "Sites", "Stack", "read", "sites", "write"]
