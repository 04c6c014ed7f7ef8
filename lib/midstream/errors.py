"""The ways a request can end, each with the exit code the command line gives it."""


class MidstreamError(Exception):
    """An experiment or a build failed (exit code 1)."""

    exit_code = 1


class RequestError(MidstreamError):
    """The request was wrong; refused before any work started (exit code 2)."""

    exit_code = 2


class AssetError(MidstreamError):
    """A model or data set cannot be had (exit code 3)."""

    exit_code = 3


class HookError(MidstreamError, RuntimeError):
    """A hook cannot handle this model or call truthfully, so it refuses."""
