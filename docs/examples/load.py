"""A student in plain diffusers: no diffdistill here. `python load.py runs/example/student`."""

import sys

import torch
from diffusers import DiffusionPipeline

folder = sys.argv[1] if len(sys.argv) > 1 else "runs/example/student"
pipeline = DiffusionPipeline.from_pretrained(folder)  # the README in the folder says where more is needed
seeds = [torch.Generator().manual_seed(seed) for seed in range(10)]
images = pipeline(batch_size=10, class_labels=list(range(10)), generator=seeds).images  # one step, as it was trained
for label, image in enumerate(images):
    image.resize((128, 128)).save(f"digit-{label}.png")
print(f"{len(images)} images of {type(pipeline).__name__}: digit-0.png to digit-{len(images) - 1}.png")
