"""Our Inception against those of pytorch-fid and torch-fidelity, in an environment of their own.

    python tests/inception_peers.py [--environment DIR] [--images 128]

All three get the same random weights and images, and each peer computes its features with its own resize. Ours must
agree within 1e-5, and so must the FID of the two halves: of all features by our formula, and by each peer's own of the
means of 32 groups, which few images suffice for (with fewer images than features their roots lose digits, see
eval/metrics.py).
Needs PyPI and some 6 GB of disk; DIR is kept and used again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

PACKAGES = ("torch==2.14.1", "torchvision==0.29.1", "pytorch-fid==0.3.0", "torch-fidelity==0.4.0", "scipy<1.18")
TOLERANCE = 1e-5

PEERS = """
import json, sys
import numpy as np, torch
weights, images, out = sys.argv[1:]
torch.set_num_threads(1)
state = torch.load(weights, weights_only=True)
x = torch.from_numpy(np.load(images))
half = len(x) // 2

import pytorch_fid.inception as theirs
from pytorch_fid.fid_score import calculate_frechet_distance
theirs.load_state_dict_from_url = lambda *_, **__: state
network = theirs.InceptionV3().eval()
found = {}
with torch.no_grad():
    found["pytorch-fid"] = torch.cat([network(part / 255)[0].flatten(1) for part in x.split(16)])

from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], weights)
with torch.no_grad():
    parts = [network(part) for part in x.split(16)]
found["torch-fidelity"], found["logits"] = (torch.cat(column) for column in zip(*parts))
np.savez(out, **{name: value.numpy() for name, value in found.items()})

few = found["pytorch-fid"].unflatten(1, (32, 64)).mean(2).double().numpy()
moments = [f(part) for part in (few[:half], few[half:]) for f in (lambda p: p.mean(0), lambda p: np.cov(p.T))]
few = found["torch-fidelity"].unflatten(1, (32, 64)).mean(2).double()
a, b = fid_features_to_statistics(few[:half]), fid_features_to_statistics(few[half:])
print(json.dumps({
    "pytorch-fid": float(calculate_frechet_distance(*moments)),
    "torch-fidelity": float(fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"]),
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, help="folder of the peers' environment, made if it is not there")
    parser.add_argument("--images", type=int, default=128, help="in both sets together")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        environment = options.environment or Path(scratch) / "environment"
        ok = compare(peers_python(environment), Path(scratch), options.images)
    sys.exit(not ok)


def peers_python(environment: Path) -> Path:
    python = environment / "bin" / "python"
    if not python.exists():
        venv.create(environment, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


def compare(python: Path, scratch: Path, count: int) -> bool:
    import numpy as np
    import torch
    from torch import nn

    from diffdistill.eval.features.inception import Inception, folded

    torch.manual_seed(0)
    networks = {"torch-fidelity": Inception("tf1"), "pytorch-fid": Inception("pytorch-fid")}
    ours = networks["torch-fidelity"]
    with torch.no_grad():
        for part in ours.modules():
            if isinstance(part, nn.Conv2d):
                part.weight.normal_(0, (2 / part.weight[0].numel()) ** 0.5)
            elif isinstance(part, nn.BatchNorm2d):
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(0, 0.2)
                part.running_mean.normal_(0, 0.2)
                part.running_var.uniform_(0.5, 1.5)
    networks["pytorch-fid"].load_state_dict(ours.state_dict())
    images = torch.randint(0, 256, (count, 3, 48, 48), dtype=torch.uint8)
    images[count // 2 :] = images[count // 2 :] // 2 + 40  # another distribution
    files = [str(scratch / name) for name in ("weights.pth", "images.npy", "features.npz")]
    torch.save(dict(ours.state_dict()), files[0])
    np.save(files[1], images.numpy())
    output = subprocess.run([python, "-c", PEERS, *files], check=True, stdout=subprocess.PIPE, text=True).stdout
    peers = json.loads(output.splitlines()[-1])
    with np.load(files[2], allow_pickle=False) as held:
        theirs = {name: torch.from_numpy(held[name]) for name in held.files}

    errors = {}
    for name, network in networks.items():
        features = torch.cat([network(part) for part in images.split(16)])
        fast = torch.cat([folded(network)(part) for part in images.split(16)])
        errors[f"features, {name}"] = relative(features, theirs[name])
        errors[f"features of the folded network, {name}"] = relative(fast, theirs[name])
        whole, of_theirs = distance(features, count), distance(theirs[name], count)
        few = distance(features.unflatten(1, (32, 64)).mean(2), count)
        errors[f"FID of 2048 features, {name} ({of_theirs:.6f}; ours {whole:.6f})"] = abs(whole / of_theirs - 1)
        errors[f"FID by {name} of 32 means ({peers[name]:.6f}; ours {few:.6f})"] = abs(few / peers[name] - 1)
        if name == "torch-fidelity":
            errors["logits without bias, torch-fidelity"] = relative(network.logits(features), theirs["logits"])
    for what, error in errors.items():
        print(f"{'ok ' if error <= TOLERANCE else 'BAD'} {error:.1e}  {what}")
    return all(error <= TOLERANCE for error in errors.values())


def distance(features, count: int) -> float:
    from diffdistill.eval.metrics.frechet import frechet_distance
    from diffdistill.eval.metrics.moments import statistics

    return frechet_distance(statistics(features[: count // 2]), statistics(features[count // 2 :]))


def relative(ours, theirs) -> float:
    """Largest difference, in units of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


if __name__ == "__main__":
    main()
