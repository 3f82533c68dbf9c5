"""Models of runs of the `fastelbo` command."""

from pathlib import Path

from fastelbo.models.vae import VAE
from fastelbo.ppca import PPCA


def load(path: str | Path) -> VAE | PPCA:
    """The model that `fastelbo train` wrote, in evaluation mode, on the CPU.

    Args:
        path: the folder of a run, or a checkpoint.pt.

    Returns:
        A `VAE` that encodes, samples and evaluates, or a `PPCA`.

    Raises:
        OSError: there is no such file, or the system cannot read it.
        ValueError: it is damaged, or no checkpoint of fastelbo.
    """
    from fastelbo.commands import files, ppca, train  # they import more than a user of the library needs

    state = files.read_checkpoint(Path(path))
    with files.reading(Path(path), files.CHECKPOINT):
        model: VAE | PPCA = ppca.model_of(state) if state["model_kind"] == "ppca" else train.model_of(state)
    return model.eval()
