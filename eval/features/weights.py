"""Standard weights files of the measuring networks: what they must be, where they lie, where they come from."""

import hashlib
import io
import os
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from diffdistill.errors import UserError
from diffdistill.files import atomic_write

FOLDER = "DIFFDISTILL_WEIGHTS"
TIMEOUT = 60  # seconds without an answer


@dataclass(frozen=True)
class Standard:
    """A file that everybody measures with. `names`: what it may be called; the first is where a download goes."""

    what: str
    names: tuple[str, ...]
    url: str
    sha256: str


INCEPTION = Standard(
    "Inception-v3 2015-12-05",
    # pytorch-fid's and torch-fidelity's (and torchmetrics'): the same bytes.
    ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth"),
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
ALEXNET = Standard(
    "AlexNet",
    ("alexnet-owt-7be5be79.pth",),
    "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
)


def find_weights(key: str, standard: Standard, choice: str | None = None) -> Path:
    """The file of `standard`: `given` (a file, or a folder that holds it); else in the folder $DIFFDISTILL_WEIGHTS;
    else in torch.hub's cache, to which it is downloaded if it is nowhere, unless HF_HUB_OFFLINE is set.

    Raises UserError if it is missing, and says what to fetch and where to put it. Its content is not looked at.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    put = f"fetch {standard.url} and put it into {cache} or a folder named by ${FOLDER}, or give {key}=FILE"
    if choice is not None:
        path = Path(choice).expanduser()
        if path.is_file():
            return path
        if place := _among(path, standard):
            return place
        lacks = f"the folder has no {standard.names[0]}" if path.is_dir() else "it does not exist"
        raise UserError(f"weights: {key}: {choice!r} is not {standard.what}: {lacks}; {put}")
    for folder in (os.environ.get(FOLDER), str(cache)):
        if folder and (place := _among(Path(folder).expanduser(), standard)):
            return place
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(f"weights: {key}: {standard.names[0]} is not here and HF_HUB_OFFLINE is set; {put}")
    try:
        with urlopen(standard.url, timeout=TIMEOUT) as answer:
            data = answer.read()
    except (OSError, HTTPException) as error:
        raise UserError(f"weights: {key}: {standard.names[0]} is not here nor to be had ({error}); {put}") from error
    _verify(key, standard, standard.url, hashlib.sha256(data).hexdigest())
    return atomic_write(cache / standard.names[0], data)


def read_weights(key: str, standard: Standard, choice: str | None = None) -> tuple[dict[str, Tensor], str]:
    """The tensors of the file that `find_weights` finds, on the CPU, and what to call them.

    A .safetensors file given by name may hold other weights, and is called by its checksum. Any other file is read
    only after its sha256 is that of `standard`. Raises UserError.
    """
    path = find_weights(key, standard, choice)
    data = path.read_bytes()  # once: what is verified is what is read
    digest = hashlib.sha256(data).hexdigest()
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load(data), f"{standard.what.split()[0]} with weights {digest[:8]}"
        except SafetensorError as error:
            raise UserError(f"weights: {key}: {path} cannot be read ({error}); give {standard.names[0]}") from error
    _verify(key, standard, str(path), digest)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), standard.what


def _among(folder: Path, standard: Standard) -> Path | None:
    return next((folder / name for name in standard.names if (folder / name).is_file()), None)


def _verify(key: str, standard: Standard, source: str, digest: str) -> None:
    if digest != standard.sha256:
        raise UserError(
            f"weights: {key}: {source} is not {standard.what}: its sha256 begins with {digest[:8]} and not with "
            f"{standard.sha256[:8]}; fetch {standard.url} anew"
        )


def load_state(key: str, network: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Load weights that were read into their network; UserError if they are of another."""
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"weights: {key}: the file is not of {what}: {str(error).splitlines()[1].strip()}") from error
