"""Mistakes in the matching whose discriminator looks at images."""

_FL = "tests/methods/test_flash_dmd.py"

MUTANTS = {
    f"methods/flash_dmd.py | {_FL}": [
        ("all but the last are matched", "or (self.steps + 1) // 2", "or self.steps - 1"),
        (
            "fewer are matched than is said",
            "range(self.config.matched_steps or",
            "range(self.config.matched_steps and 1 or",
        ),
        ("the last alone is judged", "min(self.matched_levels().stop, self.steps - 1)", "self.steps - 1"),
        ("one draw of both levels", 'batch, "student/judged level")', "batch)"),
        ("its weight is ignored", "self.config.gan_weight * gan", "gan"),
        ("the matched samples are judged", "x if self.steps == 1 else self.judged(batch)", "x"),
        (
            "what is matched is what is judged",
            "        return x, Outcome(outcome.loss",
            "        return self.judged(batch), Outcome(outcome.loss",
        ),
        ("no images are needed", "frozenset({Need.IMAGES})", "frozenset()"),
        ("latents are not decoded", "({Need.DECODER} if teacher.latent else set())", "set()"),
        ("it draws what is matched", "partial(self.judged, batch))", 'partial(self.generate, batch, "student"))'),
    ],
    f"diffdistill/scaffold/adversary.py | {_FL}": [
        (
            "pixels: the samples have a gradient",
            "            with torch.no_grad():\n                x = draw()",
            "            x = draw()",
        ),
        (
            "pixels: the student's samples are drawn anew",
            "self.samples.pop(batch.first, None)\n        if x is None:",
            "None\n        if x is None:",
        ),
        (
            "pixels: real and generated are swapped",
            "self.logits(batch.images), self.logits(x)",
            "self.logits(x), self.logits(batch.images)",
        ),
        (
            "pixels: samples are looked at as they are",
            "self.discriminator(self.as_images(x).to(",
            "self.discriminator(x.to(",
        ),
    ],
    f"diffdistill/scaffold/method.py | {_FL}": [
        ("images are of unit variance", "samples = x * self.schedule.data_std", "samples = x"),
        ("latents are no images", "return self.decode(samples)", "return samples"),
    ],
    f"diffdistill/scaffold/matching.py | {_FL}": [
        ("a discriminator has the fake score's rate", 'getattr(c, f"{player}_lr", c.fake_score_lr)', "c.fake_score_lr"),
        (
            "further players rest where the student does",
            "return [fake_score, *self.other_turns(step)]",
            "return [fake_score]",
        ),
        (
            "the matched levels are drawn from all",
            "drawn_level(len(levels), batch)]",
            "drawn_level(self.steps, batch) % len(levels)]",
        ),
    ],
    f"diffdistill/players/discriminator.py | {_FL}": [
        ("images: latents have the teacher's channels", "3 if latent else shape[0]", "shape[0]"),
        ("images: the logit of one place", "reshape(len(images), -1).mean(1)", "reshape(len(images), -1)[:, 0]"),
        ("images: no norm", "nn.GroupNorm(8, width) if k else", "nn.Identity() if k else"),
    ],
    f"diffdistill/data/seen.py | {_FL}": [
        (
            "no gradient to the student",
            "            return autoencoder.decode(held[0], latents.to(",
            "            return autoencoder.decode(held[0], latents.detach().to(",
        ),
        ("the vae is trained", "vae.requires_grad_(False).eval()", "vae.eval()"),
    ],
    "diffdistill/training/derived.py | tests/training/test_derived.py": [
        ("spans of a long training", "if s.steps >= LONG or not s.given(option):", "if not s.given(option):"),
        ("spans that the method does not have", "if s.steps >= LONG or not s.given(option):", "if s.steps >= LONG:"),
        ("a second stage where there is none", "staged = s.given(second) and", "staged ="),
        ("the stages overlap", "max(1, s.steps - s.given(first))", "s.given(first)"),
        ("the rest of a stage that was given", " or s.given(first) != max(1, int(share * s.steps)):", ":"),
        ("every mode has stages", 'if s.given("mode") == "easy":', 'if s.given("mode") is not None:'),
        ("stages without steps", 'if "steps" not in s.values or not s.stages:', "if not s.stages:"),
        ("all steps for each stage", "max(1, left // s.stages)", "left"),
        ("the first stage takes nothing from the others", 's.given("guidance_steps") or 0', "0"),
        ("one more stage", "s.steps // (s.stages + 1)", "s.steps // (s.stages + 2)"),
        ("every mode has a ramp", 'if s.given("mode") in ("training", None) else None', "if True else None"),
        ("a ramp of the training alone", '("training", None)', '("training",)'),
        (
            "matching for half of the steps",
            'option="consistency_steps", share=0.9',
            'option="consistency_steps", share=0.5',
        ),
    ],
    f"diffdistill/training/derived.py | {_FL}": [
        (
            "a fake score for each of all levels",
            'return int(s.given("matched_steps") or (levels + 1) // 2)',
            "return levels",
        ),
    ],
}
