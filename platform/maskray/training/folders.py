"""Names of checkpoints' folders. No torch here: Ray's processes that only read names start a second earlier."""

FOLDER_PREFIX = "step_"


def folder_name(step: int, attempt: str) -> str:
    """Name of a checkpoint's folder: an attempt never writes into another's folder."""
    return f"{FOLDER_PREFIX}{step:09d}-{attempt}"


def step_of(name: str) -> int:
    """The step in a folder's name."""
    return int(name.removeprefix(FOLDER_PREFIX).partition("-")[0])
