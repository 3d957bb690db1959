"""What the trainings of `diffdistill verify` reach in the plane at several seeds, as shares of their limits.

    python tests/plane_seeds.py [METHOD ..] [--seeds 1,2,3]

A training of `verify` has seed 0, so that these are other noise, data and classes. Twenty seconds a training and seed.
"""

import argparse

from diffdistill.catalogue import describe_method, method_names
from diffdistill.environment import use_machine
from diffdistill.exact.plane import limit_of, measures, train_on_the_plane


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=method_names())
    parser.add_argument("--seeds", default="1,2,3")
    arguments = parser.parse_args()
    use_machine("cpu", 1)
    for name in arguments.methods:
        info = describe_method(name)
        for training, options in (info.plane or {}).items():
            for seed in map(int, arguments.seeds.split(",")):
                method, trainer = train_on_the_plane(info, {**options, "seed": seed})
                scale = float(options.get("guidance_scale") or 1.0)
                with trainer.evaluating():
                    found = measures(method.sampler(), scale, trajectory=info.about.kind != "distribution")
                worst: dict[str, float] = {}
                for measure, value in found.items():
                    kind = measure.split(",")[0].split()[0]
                    worst[kind] = max(worst.get(kind, 0.0), value / limit_of(measure))
                shown = "  ".join(f"{kind} {share:.2f}" for kind, share in worst.items())
                print(f"{name}, {training}, seed {seed}: {max(worst.values()):.2f} of a limit  ({shown})", flush=True)


if __name__ == "__main__":
    main()
