"""Optional dependencies: how to install the packages that a study or command needs."""


def install(extra: str) -> str:
    """Returns the command that installs an extra, to be run in a checkout of the repository."""
    return f"In a checkout of prograde, run: pip install '.[{extra}]'"
